"""LLaVA-OneVision: its token rule against numbers worked out by hand, and its cap against the unchanged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

from eightgig import registry
from eightgig.registry.llava_onevision import LlavaOnevisionFamily, TileGrids
from tiny_families.llava_onevision import TINY
from tiny_family import build_tiny_family

FAMILY = LlavaOnevisionFamily()
FACTS = registry.get("llava-onevision-7b").facts
TILE_PX = 384
SIDES = tuple(range(TILE_PX, 7 * TILE_PX, TILE_PX))
GRIDS = TileGrids(tuple((height, width) for height in SIDES for width in SIDES), TILE_PX, 27, 9)


@pytest.mark.parametrize(
    ("width_px", "height_px", "num_tokens"),
    [
        (384, 384, 729 + 27 * 28),  # one tile beside the whole image
        (768, 384, 729 + 27 * 55),  # 1 × 2 tiles
        (300, 150, 729 + 13 * 28),  # one tile holds all its pixels; half of it is padding
        (1152, 1152, 729 + 81 * 82),  # 3 × 3: nine tiles are kept as they are
        (2304, 2304, 729 + 81 * 82),  # 6 × 6: 162 × 162 features, halved
        (768, 192, 729 + 13 * 55),  # 1 × 2, half of it padding: 27 - 2 · ((27 - 13) // 2) = 13 rows
    ],
)
def test_tokens_of_known_sizes(width_px: int, height_px: int, num_tokens: int) -> None:
    assert FAMILY.num_image_tokens(FACTS, None, width_px=width_px, height_px=height_px) == num_tokens


@given(
    st.integers(min_value=1, max_value=5000),
    st.integers(min_value=1, max_value=5000),
    st.integers(min_value=1, max_value=2400),
)
def test_the_cap_bounds_the_grid_that_is_then_chosen(width_px: int, height_px: int, cap_px: int) -> None:
    width, height = GRIDS.capped_size(width_px, height_px, cap_px)
    grid_height, grid_width = GRIDS.best_px(width, height)
    assert grid_height * grid_width <= max(cap_px**2, TILE_PX**2)
    if (width, height) != (width_px, height_px):
        assert width <= grid_width
        assert height <= grid_height
        assert GRIDS.capped_size(width, height, cap_px) == (width, height)


def test_a_large_enough_cap_leaves_images_alone() -> None:
    assert GRIDS.capped_size(4000, 3000, FACTS.image_px) == (4000, 3000)


def test_the_unchanged_model_takes_capped_images(tmp_path: Path) -> None:
    (tiny,) = TINY
    folder = build_tiny_family(tiny, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = FAMILY.load_processor(str(folder))
    FAMILY.apply_image_px(None, processor, 40)
    uncapped = FAMILY.num_image_tokens(tiny.facts, None, width_px=200, height_px=150)
    for size in ((200, 150), (400, 9), (17, 90), (16, 16)):
        inputs = FAMILY.process_images(processor, [Image.new("RGB", size, "red")])
        with torch.no_grad():
            features = model.model.get_image_features(**inputs).pooler_output
        predicted = FAMILY.num_image_tokens(tiny.facts, 40, width_px=size[0], height_px=size[1])
        assert [len(feature) for feature in features] == [predicted]
        assert predicted < uncapped
    processor.save_pretrained(tmp_path / "saved")
    saved = FAMILY.load_processor(str(tmp_path / "saved"))
    inputs = FAMILY.process_images(saved, [Image.new("RGB", (200, 150), "red")])
    assert FAMILY.expand_placeholders(saved, inputs, 1) == ["<image>" * uncapped]


def test_below_a_tile_the_user_is_told() -> None:
    assert "tiles of 384 px" in str(FAMILY.image_px_note(FACTS, 336))
    assert FAMILY.image_px_note(FACTS, TILE_PX) is None
