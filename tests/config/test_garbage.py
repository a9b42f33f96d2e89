"""Whatever a file holds, the answer is a configuration or a ConfigError, never a traceback."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config import TrainingConfig, load_config, resolve
from eightgig.config.shape import all_paths
from eightgig.core.errors import ConfigError

SECTIONS = ["training", "training.lora", "training.quantization", "data", "hardware", "model", "nowhere", ""]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
paths = st.sampled_from([*all_paths(), *SECTIONS]) | st.text(max_size=8)


def _nest(values_by_path: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values_by_path.items():
        node = tree
        *groups, key = path.split(".")
        for group in groups:
            child = node.setdefault(group, {})
            node = child if isinstance(child, dict) else node
        node[key] = value
    return tree


def _load(text: str | bytes, suffix: str) -> TrainingConfig | ConfigError:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            return load_config(path).config
        except ConfigError as error:
            return error


@given(st.dictionaries(paths, values, max_size=5))
def test_any_settings_load_or_are_reported(values_by_path: dict[str, Any]) -> None:
    outcome = _load(json.dumps(_nest(values_by_path)), ".json")
    assert isinstance(outcome, TrainingConfig | ConfigError)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@given(
    text=st.text(alphabet=st.sampled_from("ab:-[]{}!&*?|>'\"#%@,\n \t0.e~<\\/ü"), max_size=40) | st.binary(max_size=30)
)
def test_any_text_loads_or_is_reported(suffix: str, text: str | bytes) -> None:
    assert isinstance(_load(text, suffix), TrainingConfig | ConfigError)


@pytest.mark.parametrize("depth", [5, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]"), ('{"data": {"data_path":', "}}")])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_any_depth_is_reported(depth: int, opening: str, closing: str, suffix: str) -> None:
    assert isinstance(_load(f"{opening * depth} 1 {closing * depth}", suffix), ConfigError)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_number_of_thousands_of_digits_is_reported(suffix: str) -> None:
    assert isinstance(_load(f'{{"seed": {"9" * 5000}}}', suffix), ConfigError)


@given(st.dictionaries(paths, st.text(max_size=12), max_size=4))
def test_any_override_holds_or_is_reported(overrides: dict[str, str]) -> None:
    try:
        outcome: object = resolve("balanced", overrides).config
    except ConfigError as error:
        outcome = error.problems[0]
    assert outcome
