"""The method follows from 4-bit weights and LoRA, they follow from the method, and contradictions are errors."""

from __future__ import annotations

import itertools

import pytest
from pydantic import ValidationError

from eightgig.config import (
    ConfigPresets,
    LoRAConfig,
    QuantizationConfig,
    TrainingConfig,
    TrainingHyperparameters,
    TrainingMethod,
)

ABSENT = object()


@pytest.mark.parametrize(
    ("given", "method", "load_in_4bit", "has_lora"),
    [
        ({}, "qlora", True, True),
        ({"quantization": QuantizationConfig()}, "qlora", True, True),
        ({"quantization": QuantizationConfig(load_in_4bit=True)}, "qlora", True, True),
        ({"quantization": QuantizationConfig(load_in_4bit=False)}, "lora", False, True),
        ({"quantization": {"load_in_4bit": False}, "lora": {"rank": 4}}, "lora", False, True),
        ({"quantization": {"load_in_4bit": False}, "lora": None}, "full", False, False),
        ({"lora": None}, "full", False, False),
        ({"lora": LoRAConfig(rank=4)}, "qlora", True, True),
        ({"method": "lora"}, "lora", False, True),
        ({"method": "LORA"}, "lora", False, True),
        (
            {"method": TrainingMethod.LORA, "quantization": QuantizationConfig(bnb_4bit_quant_type="fp4")},
            "lora",
            False,
            True,
        ),
        ({"method": "full"}, "full", False, False),
        ({"method": "full", "quantization": {"bnb_4bit_quant_type": "fp4"}}, "full", False, False),
        ({"method": "qlora"}, "qlora", True, True),
    ],
)
def test_what_is_left_open_follows(given: dict, method: str, load_in_4bit: bool, has_lora: bool) -> None:
    training = TrainingHyperparameters(**given)
    assert training.method is TrainingMethod(method)
    assert training.quantization.load_in_4bit is load_in_4bit
    assert (training.lora is not None) is has_lora


def test_following_keeps_the_other_quantisation_settings() -> None:
    training = TrainingHyperparameters(method="lora", quantization=QuantizationConfig(bnb_4bit_quant_type="fp4"))
    assert training.quantization.bnb_4bit_quant_type == "fp4"


def test_every_combination_is_either_consistent_or_an_error() -> None:
    """An independent table: of all spelled-out combinations only these three name one method."""
    consistent = {("qlora", True, True), ("lora", False, True), ("full", False, False)}
    for method, load_in_4bit, has_lora in itertools.product(("qlora", "lora", "full"), (True, False), (True, False)):
        given = {
            "method": method,
            "quantization": {"load_in_4bit": load_in_4bit},
            "lora": {"rank": 4} if has_lora else None,
        }
        if (method, load_in_4bit, has_lora) in consistent:
            assert TrainingHyperparameters(**given).method == method
        else:
            with pytest.raises(ValidationError, match="contradicts"):
                TrainingHyperparameters(**given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "qlora", "quantization": {"load_in_4bit": False}}, ["training.quantization.load_in_4bit = false"]),
        ({"method": "lora", "quantization": {"load_in_4bit": True}}, ["training.quantization.load_in_4bit = true"]),
        ({"method": "full", "lora": {"rank": 8}}, ["training.lora = {...}"]),
        ({"method": "lora", "lora": None}, ["training.lora = null"]),
        (
            {"method": "qlora", "quantization": {"load_in_4bit": False}, "lora": None},
            ["training.quantization.load_in_4bit = false", "training.lora = null"],
        ),
    ],
)
def test_a_contradiction_names_both_settings_and_their_values(given: dict, named: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(training=given)
    errors = caught.value.errors()
    assert [error["loc"] for error in errors] == [("training", "method")] * len(named)
    for error, other in zip(errors, named, strict=True):
        assert error["input"] == given["method"]
        assert f"contradicts {other}:" in error["msg"]


def test_4bit_weights_without_lora_blame_the_two_settings_that_were_given() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(training={"quantization": {"load_in_4bit": True}, "lora": None})
    (error,) = caught.value.errors()
    assert error["loc"] == ("training", "lora")
    assert "contradicts training.quantization.load_in_4bit = true" in error["msg"]


@pytest.mark.parametrize(
    ("overrides", "method", "load_in_4bit", "has_lora"),
    [
        ({"training.method": "lora"}, "lora", False, True),
        ({"training.method": "full"}, "full", False, False),
        ({"training.quantization.load_in_4bit": False}, "lora", False, True),
        ({"training.lora": None}, "full", False, False),
        ({"training.method": "qlora"}, "qlora", True, True),
    ],
)
def test_an_override_moves_a_quantised_config_to_another_method(
    overrides: dict, method: str, load_in_4bit: bool, has_lora: bool
) -> None:
    from eightgig.config.layers import Layer, nested
    from eightgig.config.loading import resolve_layers

    saved = Layer("file run.yaml", TrainingConfig().model_dump(mode="json"))
    training = resolve_layers([saved, Layer("flag --set", nested(overrides))]).config.training
    assert (training.method, training.quantization.load_in_4bit, training.lora is not None) == (
        method,
        load_in_4bit,
        has_lora,
    )


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        ({"training.method": "qlora"}, "qlora"),
        ({"training.method": "lora"}, "lora"),
        ({"training.quantization.load_in_4bit": True}, "qlora"),
        ({"training.lora.rank": 4}, "lora"),
    ],
)
def test_an_override_moves_the_full_preset_to_adapters(overrides: dict, method: str) -> None:
    training = ConfigPresets.full(overrides=overrides).training
    assert training.method == method
    assert training.lora is not None


def test_an_override_of_two_contradicting_settings_stays_an_error() -> None:
    from eightgig.core.errors import ConfigError

    with pytest.raises(
        ConfigError, match=r"training\.method = qlora: contradicts training\.quantization\.load_in_4bit"
    ):
        ConfigPresets.full(overrides={"training.method": "qlora", "training.quantization.load_in_4bit": False})
