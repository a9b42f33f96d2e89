"""Levers that a configuration leaves to the plan, and such that it pins."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config import ConfigPresets, HardwareConfig, TrainingConfig, json_schema, load_config, resolve
from eightgig.config.levers import AUTO, LEVER_NAMES, Levers, automatic_paths, settled
from eightgig.core.errors import ConfigError

PATHS = [f"hardware.{name}" for name in LEVER_NAMES]
PINNED: dict[str, st.SearchStrategy[Any]] = {
    "checkpointed_layers": st.none() | st.integers(1, 99),
    "offload_layer_inputs": st.booleans(),
    "mlp_tile_tokens": st.none() | st.integers(1, 9999),
    "embedding_on_host": st.booleans(),
    "streamed_layers": st.just(0) | st.integers(3, 99),
    "cache_image_features": st.booleans(),
    "micro_batches_per_pass": st.sampled_from([1, 2, 4, 8, 16]),
}
PLAIN = {
    "checkpointed_layers": None,
    "offload_layer_inputs": False,
    "mlp_tile_tokens": None,
    "embedding_on_host": False,
    "streamed_layers": 0,
    "cache_image_features": False,
    "micro_batches_per_pass": 1,
}


def test_every_lever_is_tested_here() -> None:
    assert set(LEVER_NAMES) == set(PINNED) == set(PLAIN)
    assert asdict(Levers()) == PLAIN


@pytest.mark.parametrize("config", [TrainingConfig(), *(getattr(ConfigPresets, n)() for n in ConfigPresets.names())])
def test_all_are_left_to_the_plan_by_default_and_plain_without_one(config: TrainingConfig) -> None:
    assert automatic_paths(config) == set(PATHS)
    assert asdict(config.hardware.levers) == PLAIN
    assert json.loads(config.model_dump_json())["hardware"]["streamed_layers"] == AUTO


@given(st.fixed_dictionaries({}, optional={name: values | st.just(AUTO) for name, values in PINNED.items()}))
def test_what_is_given_is_pinned_and_auto_gives_it_back(given_levers: dict[str, Any]) -> None:
    config = TrainingConfig(hardware=HardwareConfig(**given_levers))
    pinned = {name: value for name, value in given_levers.items() if value != AUTO}
    assert automatic_paths(config) == {f"hardware.{name}" for name in LEVER_NAMES if name not in pinned}
    assert asdict(config.hardware.levers) == {**PLAIN, **pinned}
    chosen = {"checkpointed_layers": 5, "embedding_on_host": True, "streamed_layers": 4, "device": "cpu"}
    resolved = settled(config, chosen)
    assert automatic_paths(resolved) == set()
    expected = {**PLAIN, **{name: value for name, value in chosen.items() if name in PLAIN}, **pinned}
    assert asdict(resolved.hardware.levers) == expected
    assert resolved.hardware.device == "auto"
    assert asdict(settled(config).hardware.levers) == asdict(config.hardware.levers)
    assert TrainingConfig.model_validate(resolved.model_dump(mode="json")) == resolved


@pytest.mark.parametrize(
    ("text", "value"), [("auto", AUTO), ("0", 0), ("12", 12)], ids=["given back", "pinned off", "pinned"]
)
def test_a_flag_pins_and_gives_back(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("hardware:\n  streamed_layers: 7\n  embedding_on_host: auto\n")
    resolved = resolve(path, {"hardware.streamed_layers": text})
    assert resolved.config.hardware.streamed_layers == value
    assert resolved.config.hardware.embedding_on_host == AUTO
    assert resolved.sources["hardware.streamed_layers"] == "flag --set"


def test_a_file_of_an_earlier_version_means_what_it_did(tmp_path: Path) -> None:
    """As 0.x wrote them: every lever with its value, none of them a word."""
    values = TrainingConfig().model_dump(mode="json")
    values["hardware"] |= {**PLAIN, "checkpointed_layers": 12}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    config = load_config(path).config
    assert automatic_paths(config) == set()
    assert asdict(config.hardware.levers) == {**PLAIN, "checkpointed_layers": 12}
    assert config.model_dump(mode="json") == values


@pytest.mark.parametrize(
    ("setting", "text", "allowed"),
    [
        ("offload_layer_inputs", "1", "true or false or auto"),
        ("cache_image_features", "automatic", "true or false or auto"),
        ("checkpointed_layers", "0", "a whole number at least 1 or auto or null"),
        ("mlp_tile_tokens", "-5", "a whole number at least 1 or auto or null"),
        ("streamed_layers", "null", "a whole number at least 0 or auto"),
        ("streamed_layers", "2", "0, or at least 3: the weights of two streamed layers are on the GPU at any time"),
    ],
)
def test_anything_else_is_one_problem_at_the_settings_own_path(setting: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("ultra_low_memory", {f"hardware.{setting}": text})
    assert [(problem.path, problem.allowed) for problem in caught.value.problems] == [(f"hardware.{setting}", allowed)]


def test_what_is_left_to_the_plan_contradicts_nothing() -> None:
    for settings in (
        {"hardware": {"gradient_checkpointing": False}},
        {"training": {"method": "full"}},
        {"training": {"method": "lora"}},
    ):
        assert automatic_paths(TrainingConfig.model_validate(settings)) == set(PATHS)


def test_editors_are_told_of_the_word() -> None:
    properties = json_schema()["$defs"]["HardwareConfig"]["properties"]
    for name in LEVER_NAMES:
        assert {"const": AUTO, "type": "string"} in properties[name]["anyOf"]
        assert properties[name]["default"] == AUTO
