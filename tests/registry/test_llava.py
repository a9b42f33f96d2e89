"""LLaVA: its numbers, its image rule, its stand-in processor, and its positions at another image size."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny
from eightgig import registry
from eightgig.core.errors import ConfigError
from eightgig.registry.llava import LLAVA_1_5_7B, LlavaFamily
from eightgig.registry.standin import byte_level_tokenizer

FAMILY = LlavaFamily()


@pytest.mark.parametrize(
    ("name", "num_parameters", "language_linears"),
    [("llava-1.5-7b", 7_063_427_072, 6_476_005_376), ("llava-1.5-13b", 13_351_494_656, 12_687_769_600)],
)
def test_facts_agree_with_the_stock_class(name: str, num_parameters: int, language_linears: int) -> None:
    spec = registry.get(name)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(spec.family.build_config(spec.facts))
    matched = {path: module for path, module in model.named_modules() if re.fullmatch(spec.family.lora_pattern, path)}
    assert all(type(module) is nn.Linear for module in matched.values())
    assert sum(value.numel() for value in model.parameters()) == num_parameters == spec.facts.num_parameters
    assert sum(module.weight.numel() for module in matched.values()) == language_linears
    assert len(matched) == spec.facts.num_language_linears
    paths = spec.family.modules
    for path in (paths.language_model, *paths.towers, *paths.projectors, paths.lm_head, *spec.family.keep_16bit):
        assert isinstance(model.get_submodule(path), nn.Module)
    assert len(spec.family.decoder_layers(model)) * 7 == len(matched)


@pytest.mark.parametrize(("image_px", "num_tokens"), [(None, 576), (336, 576), (224, 256), (14, 1)])
def test_image_tokens_follow_the_grid_and_not_the_image(image_px: int | None, num_tokens: int) -> None:
    for size in ((10, 2000), (336, 336)):
        count = FAMILY.num_image_tokens(LLAVA_1_5_7B, image_px, width_px=size[0], height_px=size[1])
        assert count == num_tokens


@given(st.integers(min_value=1, max_value=2000))
def test_only_whole_patches_are_accepted(image_px: int) -> None:
    if image_px % 14 == 0:
        FAMILY.check_image_px(LLAVA_1_5_7B, image_px)
    else:
        with pytest.raises(ConfigError, match=r"data\.image_size = \d+: a multiple of the patch size, 14 px") as caught:
            FAMILY.check_image_px(LLAVA_1_5_7B, image_px)
        for proposed in re.findall(r"use (\d+) or (\d+)", caught.value.next_step)[0]:
            FAMILY.check_image_px(LLAVA_1_5_7B, int(proposed))


@pytest.mark.parametrize("image_px", [None, 224])
def test_the_stand_in_processor_agrees_with_the_model(image_px: int | None) -> None:
    processor = FAMILY.build_processor(LLAVA_1_5_7B)
    FAMILY.apply_image_px(None, processor, image_px)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist das? 猫\U0001f408"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    text = processor.apply_chat_template(messages)
    assert text == "USER: <image>\nWas ist das? 猫\U0001f408 ASSISTANT: A cat. "
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == text.split("A cat.")[0].rstrip()
    batch = processor(images=[Image.new("RGB", (500, 300))], text=text, return_tensors="pt")
    num_tokens = FAMILY.num_image_tokens(LLAVA_1_5_7B, image_px, width_px=500, height_px=300)
    side_px = image_px or 336
    assert batch["pixel_values"].shape == (1, 3, side_px, side_px)
    assert int((batch["input_ids"] == 32000).sum()) == num_tokens
    assert FAMILY.expand_placeholders(processor, batch, 2) == ["<image>" * num_tokens] * 2
    assert int(batch["input_ids"].max()) == 32000
    tokenizer = processor.tokenizer
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2, 32001)
    assert tokenizer.convert_tokens_to_ids(FAMILY.end_of_turn) == 2
    assert batch["input_ids"][0, 0] == 1


def test_the_stand_in_template_equals_the_published_one(tmp_path: Path) -> None:
    ours = FAMILY.build_processor(LLAVA_1_5_7B)
    theirs = tiny.build_tiny_processor(chat_template=tiny.PUBLISHED_TEMPLATE)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?\n"}]},
    ]
    for prompt in (False, True):
        arguments = {"add_generation_prompt": prompt}
        assert ours.apply_chat_template(messages, **arguments) == theirs.apply_chat_template(messages, **arguments)


def test_the_stand_in_processor_survives_saving(tmp_path: Path) -> None:
    processor = FAMILY.build_processor(LLAVA_1_5_7B)
    FAMILY.apply_image_px(None, processor, 224)
    processor.save_pretrained(tmp_path)
    reloaded = AutoProcessor.from_pretrained(tmp_path)
    image, text = Image.new("RGB", (90, 70), "red"), "USER: <image>\nhé ASSISTANT:"
    first, second = (p(images=[image], text=text, return_tensors="pt") for p in (processor, reloaded))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])


@given(st.text(max_size=40))
def test_any_text_survives_the_byte_level_tokenizer(text: str) -> None:
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 300, "<pad>": 301}
    tokenizer = _tokenizer(tuple(special.items()))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(token_id not in special.values() and token_id < 302 for token_id in ids)


def test_ids_that_do_not_fit_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into 300 ids"):
        byte_level_tokenizer({"<s>": 300}, vocab_size=300, roles={"bos_token": "<s>"})
    with pytest.raises(ValueError, match="do not fit into 200 ids"):
        byte_level_tokenizer({"<s>": 1}, vocab_size=200, roles={"bos_token": "<s>"})


@functools.cache
def _tokenizer(special: tuple[tuple[str, int], ...]):
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return byte_level_tokenizer(dict(special), vocab_size=320, roles=roles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_px", [16, 32, 40, 64])
def test_resized_positions_equal_clips_own_interpolation(tmp_path: Path, image_px: int, dtype: torch.dtype) -> None:
    tiny.build_tiny_llava(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    resized = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=dtype)
    processor = AutoProcessor.from_pretrained(tmp_path)
    FAMILY.apply_image_px(resized, processor, image_px)
    pixels = torch.randn(2, 3, image_px, image_px, dtype=dtype)
    with torch.no_grad():
        expected = plain.model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert torch.equal(resized.model.vision_tower(pixels).last_hidden_state, expected)
        features = plain.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        for ours, theirs in zip(resized.get_image_features(pixels).pooler_output, features, strict=True):
            assert torch.equal(ours, theirs)
    assert resized.config.vision_config.image_size == image_px


def test_hidden_states_at_another_size_equal_a_plain_model_told_to_interpolate(tmp_path: Path) -> None:
    tiny.build_tiny_llava(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    tower = plain.model.vision_tower
    tower.forward = functools.partial(tower.forward, interpolate_pos_encoding=True)
    resized = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    FAMILY.apply_image_px(resized, processor, 48)
    inputs = processor(
        images=[Image.new("RGB", (50, 50), "red")], text="USER: <image>\nx ASSISTANT:", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape[-1] == 48
    with torch.no_grad():
        ours = FAMILY.hidden_states(resized, dict(inputs))
        assert torch.equal(ours, FAMILY.hidden_states(plain, dict(inputs)))
        logits = plain(**inputs).logits
    assert torch.equal(FAMILY.logits(resized, ours), logits)


def test_a_model_saved_at_another_size_needs_nothing_on_reload(tmp_path: Path) -> None:
    tiny.build_tiny_llava(tmp_path / "own")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
    FAMILY.apply_image_px(model, AutoProcessor.from_pretrained(tmp_path / "own"), 48)
    model.save_pretrained(tmp_path / "resized")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "resized")
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        difference = reloaded.model.vision_tower(pixels)[0] - model.model.vision_tower(pixels)[0]
    assert float(difference.abs().max()) == 0.0


def test_a_tower_without_clip_positions_cannot_be_resized(tmp_path: Path) -> None:
    tiny.build_tiny_llava(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model.model.vision_tower = nn.Identity()
    with pytest.raises(ConfigError, match=r"data\.image_size = 48: only a CLIP tower's positions"):
        FAMILY.apply_image_px(model, AutoProcessor.from_pretrained(tmp_path), 48)
