"""Samples longer than a model's positions are told of."""

from __future__ import annotations

from typing import Any

import pytest

from eightgig import registry
from eightgig.config import TrainingConfig
from eightgig.data.check import SampleSize
from eightgig.train.positions import positions_note

PICTURE = ((336, 336),)


@pytest.mark.parametrize(
    ("model", "positions", "image_px", "image_tokens"),
    [("llava-1.5-7b", 4096, None, 576), ("instructblip-vicuna-7b", 2048, None, 32), ("qwen3-vl-8b", 262144, 448, 100)],
)
def test_what_is_longer_is_told_of_with_its_image_tokens(
    model: str, positions: int, image_px: int | None, image_tokens: int
) -> None:
    spec = registry.get(model)
    config = TrainingConfig.model_validate({"data": {"image_size": image_px}})
    model_config = spec.family.build_config(spec.facts)

    def note(*text_tokens: int) -> str | None:
        return positions_note(config, spec, model_config, [SampleSize(count, PICTURE) for count in text_tokens])

    most = positions - image_tokens
    assert note(17, most) is None
    told = note(most + 1, 17, most + 2, most)
    assert told is not None
    assert told.startswith(f"2 training samples are longer than the {positions:,} tokens that {model} was trained for")
    assert f"the longest {positions + 2:,}" in told


def test_a_model_that_names_no_limit_has_none() -> None:
    class Config:
        def get_text_config(self) -> Any:
            return object()

    spec = registry.get("llava-1.5-7b")
    assert positions_note(TrainingConfig(), spec, Config(), [SampleSize(1 << 30, ())]) is None
