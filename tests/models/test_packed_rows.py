"""Which models may have samples share a row, told from their configs alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.tiny_families import llava, llava_onevision

from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.models.packed_rows import check_can_pack
from eightgig.registry import ModelSpec, all_specs
from tiny_family import TinyFamily

PACKED = TrainingConfig.model_validate({"training": {"batching": "packed"}})
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


def spec_of(tiny: TinyFamily, **text: Any) -> ModelSpec:
    """The tiny model with other values in its text config."""
    architecture = tiny.facts.architecture
    changed = {**architecture, "text_config": {**architecture["text_config"], **text}}
    return ModelSpec(tiny.family, dataclasses.replace(tiny.facts, architecture=changed))


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(llava_onevision.TINY[0], use_sliding_window=True, sliding_window=16, max_window_layers=1),
        spec_of(llava.TINY[0], **MISTRAL, sliding_window=16),
    ],
    ids=["qwen2", "mistral"],
)
def test_a_text_model_with_a_window_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="within a window of 16 tokens") as caught:
        check_can_pack(PACKED, spec)
    assert "by_length" in caught.value.next_step
    check_can_pack(TrainingConfig(), spec)


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(llava_onevision.TINY[0], use_sliding_window=False, sliding_window=16),
        spec_of(llava.TINY[0], **MISTRAL, sliding_window=None),
    ],
    ids=["qwen2", "mistral"],
)
def test_one_without_is_not(spec: ModelSpec) -> None:
    assert check_can_pack(PACKED, spec) is None


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.name)
def test_published_models_are_refused_for_their_familys_reason_alone(spec: ModelSpec) -> None:
    if spec.family.packing_obstacle:
        with pytest.raises(ConfigError, match="not with"):
            check_can_pack(PACKED, spec)
    else:
        assert check_can_pack(PACKED, spec) is None
