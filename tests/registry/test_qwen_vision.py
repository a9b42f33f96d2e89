"""Qwen's published image rules against transformers' own processor, and what their settings do."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from eightgig import registry
from eightgig.core.errors import ConfigError
from eightgig.registry.qwen_vision import SPECIAL_TOKENS, PatchGrid
from tiny_families import qwen2_vl
from tiny_family import build_tiny_family

NAMES = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "qwen3.5-0.8b")


@given(
    width_px=st.integers(1, 5000),
    height_px=st.integers(1, 5000),
    factor_px=st.sampled_from([8, 28, 32]),
    min_side_px=st.integers(1, 300),
    max_side_px=st.integers(300, 4096),
)
def test_the_grid_is_smart_resize(
    width_px: int, height_px: int, factor_px: int, min_side_px: int, max_side_px: int
) -> None:
    if max(width_px, height_px) > 200 * min(width_px, height_px):
        return  # refused by both
    height, width = smart_resize(height_px, width_px, factor_px, min_side_px**2, max_side_px**2)
    grid = PatchGrid(factor_px, min_side_px**2, max_side_px**2)
    assert grid.num_tokens(width_px, height_px) == (height // factor_px) * (width // factor_px)


@pytest.mark.parametrize("name", NAMES)
def test_published_settings_give_what_the_processor_emits(name: str) -> None:
    spec, chooser = registry.get(name), random.Random(1)
    processor = spec.family.build_processor(spec.facts)
    for image_px in (None, 336):
        spec.family.apply_image_px(None, processor, image_px)
        for size in [(1, 1), (1000, 6), *((chooser.randint(5, 900), chooser.randint(5, 900)) for _ in range(4))]:
            features = spec.family.process_images(processor, [Image.new("RGB", size)])
            (text,) = spec.family.expand_placeholders(processor, features, 1)
            predicted = spec.family.num_image_tokens(spec.facts, image_px, width_px=size[0], height_px=size[1])
            assert text == "<|image_pad|>" * predicted
    ids = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    architecture = spec.facts.architecture
    assert ids[9:11] == [architecture["vision_start_token_id"], architecture["vision_end_token_id"]]
    assert ids[12:14] == [architecture["image_token_id"], architecture["video_token_id"]]
    assert processor.tokenizer.eos_token_id == ids[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_cap_bounds_the_tokens_of_any_image(name: str) -> None:
    spec = registry.get(name)
    factor_px = 28 if name.startswith("qwen2") else 32
    for size in ((4000, 3000), (336, 336), (5000, 60), (30, 2000)):
        num_tokens = spec.family.num_image_tokens(spec.facts, 336, width_px=size[0], height_px=size[1])
        assert 1 <= num_tokens <= 336**2 / factor_px**2
    with pytest.raises(ConfigError, match=rf"at least {factor_px} px"):
        spec.family.check_image_px(spec.facts, factor_px - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 256, "max_pixels": 1024},
        {"size": {"shortest_edge": 256, "longest_edge": 1024}},
        {"size": {"shortest_edge": 256, "longest_edge": 1024}, "min_pixels": None, "max_pixels": None},
    ],
)
def test_a_folder_s_own_limits_are_read(tmp_path: Path, settings: dict) -> None:
    folder = build_tiny_family(qwen2_vl.TINY[0], tmp_path)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "patch_size": 4,
                "merge_size": 2,
                "temporal_patch_size": 2,
                **settings,
            }
        )
    )
    spec = registry.resolve(str(folder))
    assert spec.facts.image_px == math.isqrt(1024)
    processor = spec.family.load_processor(str(folder))
    for size in ((100, 100), (10, 90), (9, 9)):
        features = spec.family.process_images(processor, [Image.new("RGB", size)])
        num_tokens = int(features["image_grid_thw"].prod()) // 4
        assert spec.family.num_image_tokens(spec.facts, None, width_px=size[0], height_px=size[1]) == num_tokens


def test_images_are_told_from_text_by_their_tokens() -> None:
    spec = registry.get("qwen2-vl-2b")
    processor = spec.family.build_processor(spec.facts)
    ids = processor.tokenizer("a<|image_pad|><|image_pad|>b", return_tensors="pt")["input_ids"][0]
    kinds = spec.family.token_inputs(processor, ids, torch.zeros_like(ids).bool(), {})["mm_token_type_ids"]
    assert kinds.tolist() == [0, 1, 1, 0]
    own = processor(text="a<|image_pad|>b", images=[Image.new("RGB", (56, 56))], return_tensors="pt")
    again = spec.family.token_inputs(processor, own["input_ids"][0], own["input_ids"][0] < 0, {})
    assert torch.equal(own["mm_token_type_ids"][0], again["mm_token_type_ids"])
