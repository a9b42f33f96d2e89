"""Presets: data with a reason for each value, and no way to take from one what its card can't do without."""

from __future__ import annotations

import pytest

from eightgig.config import ConfigPresets, MixedPrecision, TrainingConfig, TrainingMethod, describe, resolve
from eightgig.config.rules import value_at
from eightgig.config.shape import all_paths
from eightgig.core.errors import ConfigError

CARDS_GIB = {"ultra_low_memory": 8, "low_memory": 12, "balanced": 16, "high_quality": 24, "full": 80}
METHODS = {"high_quality": TrainingMethod.LORA, "full": TrainingMethod.FULL}


def test_the_presets_and_their_cards_are_those_promised() -> None:
    assert {name: ConfigPresets.card(name).card_gib for name in ConfigPresets.names()} == CARDS_GIB
    for name in ConfigPresets.names():
        assert f"{CARDS_GIB[name]} GB" in ConfigPresets.card(name).card
        assert getattr(ConfigPresets, name)().training.method is METHODS.get(name, TrainingMethod.QLORA)


def test_ultra_low_memory_is_the_promised_setting() -> None:
    config = ConfigPresets.ultra_low_memory()
    assert (config.training.lora.rank, config.training.lora.alpha) == (8, 16)
    assert (config.training.batch_size, config.training.gradient_accumulation_steps) == (1, 32)
    assert (config.data.max_length, config.data.image_size) == (512, 336)
    assert config.training.quantization.load_in_4bit
    assert config.training.quantization.bnb_4bit_quant_type == "nf4"
    assert config.training.quantization.bnb_4bit_use_double_quant
    assert config.hardware.mixed_precision is MixedPrecision.BF16
    assert config.hardware.gradient_checkpointing
    assert config.training.method is TrainingMethod.QLORA


@pytest.mark.parametrize("name", ConfigPresets.names())
def test_every_choice_is_a_setting_with_a_reason_and_arrives_in_the_config(name: str) -> None:
    card = ConfigPresets.card(name)
    resolved = resolve(name)
    assert resolved.config.preset == name
    rows = {row.path: row for row in describe(resolved)}
    for path, choice in card.choices.items():
        assert path in all_paths() or path == "training.lora", path
        assert len(choice.reason) > 10
        assert value_at(resolved.config, path) == choice.value
        assert resolved.sources[path] == f"preset {name}"
        assert rows[path].reason == choice.reason
    assert set(card.fixed) <= set(card.choices)


@pytest.mark.parametrize("name", ConfigPresets.names())
def test_a_fixed_setting_can_not_be_changed_while_the_preset_is_named(name: str) -> None:
    for path, reason in ConfigPresets.card(name).fixed.items():
        other = not ConfigPresets.card(name).choices[path].value
        with pytest.raises(ConfigError) as caught:
            getattr(ConfigPresets, name)(overrides={path: other})
        (problem,) = caught.value.problems
        assert problem.path == path
        assert problem.value == str(other).lower()
        assert f"preset = {name}" in problem.allowed
        assert reason in problem.allowed


def test_checkpointing_off_in_ultra_low_memory_is_an_error_in_python_too() -> None:
    with pytest.raises(ValueError, match=r"hardware\.gradient_checkpointing"):
        TrainingConfig(preset="ultra_low_memory", hardware={"gradient_checkpointing": False})


def test_overrides_and_paths_win_over_the_preset() -> None:
    config = ConfigPresets.balanced(
        data_path="a.jsonl", val_path="b.jsonl", overrides={"training.lora.rank": 4, "data": {"max_length": 64}}
    )
    assert config.training.lora.rank == 4
    assert config.training.lora.alpha == 64
    assert config.data.max_length == 64
    assert (str(config.data.data_path), str(config.data.val_path)) == ("a.jsonl", "b.jsonl")


def test_a_wrong_override_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"training\.lora\.rank = 0: a whole number from 1 to 1024"):
        ConfigPresets.balanced(overrides={"training.lora.rank": 0})
