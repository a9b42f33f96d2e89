"""Gemma 4 where it differs from all others: keys and values that layers share, extreme shapes, its budgets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from eightgig import registry
from eightgig.core.errors import ConfigError
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.registry.gemma4 import BUDGETS, GEMMA_4_E2B, Gemma4Family
from tiny_families.gemma4 import TINY
from tiny_family import build_tiny_family

FAMILY = Gemma4Family()


def gradients(folder: Path, *, checkpointed: bool) -> dict[str, Tensor]:
    """Of every weight of the language model, for one row of text."""
    spec = registry.resolve(str(folder))
    model, _ = spec.family.load_model(str(folder), dtype=torch.float32)
    model.train()
    if checkpointed:
        checkpoint_layers(model, spec.family.decoder_layers(model), preserve_rng_state=False)
    input_ids = torch.arange(8, 48).unsqueeze(0)  # longer than the window
    hidden = spec.family.hidden_states(model, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
    spec.family.logits(model, hidden).square().sum().backward()
    language_model = model.get_submodule(spec.family.modules.language_model)
    return {name: value.grad for name, value in language_model.named_parameters() if value.grad is not None}


def test_checkpointing_changes_no_gradient_of_shared_keys_and_values(tmp_path: Path) -> None:
    folder = build_tiny_family(TINY[0], tmp_path)
    expected = gradients(folder, checkpointed=False)
    found = gradients(folder, checkpointed=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    shared = [name for name in expected if "k_proj" in name or "v_proj" in name]
    assert len(shared) == 4  # the last two of the four layers have none of their own
    assert all(expected[name].any() for name in shared)


@given(width_px=st.integers(1, 5000), height_px=st.integers(1, 5000), budget=st.sampled_from(BUDGETS))
def test_any_shape_costs_what_the_processor_says(width_px: int, height_px: int, budget: int) -> None:
    image_px = math.ceil(math.sqrt(budget) * 48)
    predicted = FAMILY.num_image_tokens(GEMMA_4_E2B, image_px, width_px=width_px, height_px=height_px)
    height, width = get_aspect_ratio_preserving_size(
        height=height_px, width=width_px, patch_size=16, max_patches=budget * 9, pooling_kernel_size=3
    )
    assert predicted == height * width // 48**2 + 2


def test_image_size_chooses_the_largest_budget_within_its_area() -> None:
    processor = FAMILY.build_processor(GEMMA_4_E2B)
    for image_px, budget in ((336, 70), (401, 70), (402, 70), (568, 140), (803, 140), (804, 280), (4000, 1120)):
        FAMILY.apply_image_px(None, processor, image_px)
        assert processor.image_processor.max_soft_tokens == budget
        note = FAMILY.image_px_note(GEMMA_4_E2B, image_px)
        assert note is None or f"comes to {budget}," in note
    with pytest.raises(ConfigError, match="at least 48 px"):
        FAMILY.check_image_px(GEMMA_4_E2B, 47)
