"""Every number recorded from the original code, in every case: logits, loss, gradients, features, pixels, decoding.

Tolerances are the record's own; what a deliberate error would cause is ten times larger or more (same file).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen_vl_golden as golden
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from eightgig.models.qwen_vl.configuration import QwenVLVisionConfig
from eightgig.models.qwen_vl.image_processing import QwenVLImageProcessor
from eightgig.models.qwen_vl.load_map import STACKED
from eightgig.models.qwen_vl.vision import QwenVLVisionTower, sinusoid_table

LOGITS, LONG_LOGITS, LSE, LOSS, PIXELS = 2e-5, 5e-5, 2e-6, 5e-6, 1e-6
NORM_RELATIVE, SLICE_RELATIVE = 1e-5, 5e-5
WITH_LABELS = [name for name, case in golden.CASES.items() if "loss" in case]


def test_the_record_holds_the_cases_that_are_compared() -> None:
    padded = {"right_padded", "right_padded_mixed"}
    assert set(golden.CASES) == {"text_only", "one_image", "two_images", *padded, "left_padded", "long_2300"}
    assert set(WITH_LABELS) == {"text_only", "one_image", "two_images", *padded}


@pytest.mark.parametrize("name", golden.CASES)
def test_logits(model: Any, name: str) -> None:
    with torch.no_grad():
        logits = model(**golden.case_inputs(name)).logits
    rows, columns = golden.TENSORS[f"case.{name}.logits_index"].unbind(1)
    difference = logits[rows, columns] - golden.TENSORS[f"case.{name}.logits"]
    assert difference.abs().max() < (LONG_LOGITS if name == "long_2300" else LOGITS)
    is_token = golden.TENSORS[f"case.{name}.attention_mask"].bool()
    difference = (logits.logsumexp(-1) - golden.TENSORS[f"case.{name}.logits_lse"])[is_token]
    assert difference.abs().max() < LSE


def test_a_long_row_in_training_mode_after_one_in_evaluation(model: Any) -> None:
    """The original would keep the changed rotary base; recorded is its fresh training mode."""
    inputs = golden.case_inputs("long_2300")
    with torch.no_grad():
        model(**inputs)
        logits = model.train()(**inputs).logits
        evaluated = model.eval()(**inputs).logits
    rows, columns = golden.TENSORS["case.long_2300.logits_index"].unbind(1)
    recorded = golden.TENSORS["case.long_2300.logits_train_mode"]
    assert (logits[rows, columns] - recorded).abs().max() < LONG_LOGITS
    assert (evaluated[rows, columns] - golden.TENSORS["case.long_2300.logits"]).abs().max() < LONG_LOGITS


@pytest.mark.parametrize("name", WITH_LABELS)
def test_loss_and_gradients(model: Any, name: str) -> None:
    model.zero_grad()
    loss = model.train()(**golden.case_inputs(name, labels=True)).loss
    model.eval()
    assert abs(loss.item() - golden.CASES[name]["loss"]) < LOSS
    torch.autograd.backward(loss)
    own = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    gradients = golden.stacked(own)
    norms = {key: norm for key, norm in golden.CASES[name]["grad_norms"].items() if norm}
    assert set(gradients) == set(norms)
    for key, norm in norms.items():
        assert gradients[key].double().norm().item() == pytest.approx(norm, rel=NORM_RELATIVE), key
    slices = {key: value for key, value in golden.TENSORS.items() if key.startswith(f"grad.{name}.")}
    assert len(slices) >= 9
    for key, recorded in slices.items():
        parameter, _, tag = key.removeprefix(f"grad.{name}.").rpartition(".")
        span = golden.RECORD["grad_slices"]["slices"][parameter][tag]
        bounds = tuple(slice(*map(int, part.split(":"))) for part in span.strip("[]").split(","))
        difference = (gradients[parameter][bounds] - recorded).abs().max()
        assert difference < SLICE_RELATIVE * recorded.abs().max(), key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_transformers_changes_no_gradient(model: Any, use_reentrant: bool) -> None:
    inputs = golden.case_inputs("two_images", labels=True)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.autograd.backward(model.train()(**inputs).loss)
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    model.gradient_checkpointing_disable()
    model.eval()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_16_bit_weights_stay_near_the_record(published: Path, dtype: torch.dtype, tolerance: float) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(published, dtype=dtype)
    for name in ("one_image", "long_2300"):
        with torch.no_grad():
            logits = loaded(**golden.case_inputs(name)).logits
        rows, columns = golden.TENSORS[f"case.{name}.logits_index"].unbind(1)
        recorded = golden.TENSORS[f"case.{name}.logits"]
        assert logits.dtype == dtype
        assert (logits[rows, columns].float() - recorded).norm() / recorded.norm() < tolerance


def test_vision_features(model: Any) -> None:
    with torch.no_grad():
        features = model.transformer.visual(golden.pixel_values(["img0"]))
    assert (features - golden.TENSORS["vision.features"]).abs().max() < LOGITS


def test_a_tower_with_two_resampler_heads() -> None:
    prefix = "extra.visual_two_head_pool."
    weights = {k.removeprefix(prefix): v.float() for k, v in golden.TENSORS.items() if k.startswith(prefix)}
    for name, parts in STACKED.items():
        weights.update(zip(parts, weights.pop(name).chunk(3), strict=True))
    tower = QwenVLVisionTower(QwenVLVisionConfig(**golden.RECORD["second_tower"]["config"]))
    tower.load_state_dict(weights)
    with torch.no_grad():
        features = tower(golden.pixel_values(["img0"]))[0]
    output = "extra.visual_two_head_pool_output."
    assert (features[::16] - golden.TENSORS[f"{output}features_rows"]).abs().max() < LOGITS
    norms = golden.TENSORS[f"{output}row_norms"]
    assert ((features.norm(dim=-1) - norms) / norms).abs().max() < NORM_RELATIVE


def test_greedy_decoding(model: Any) -> None:
    prompt = golden.TENSORS["decode.prompt_ids"]
    outputs = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pixel_values=golden.pixel_values(golden.RECORD["decode"]["images"]),
        do_sample=False,
        max_new_tokens=golden.RECORD["decode"]["new_tokens"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(outputs.sequences[0, prompt.shape[1] :], golden.TENSORS["decode.greedy_ids"])
    best = torch.cat([step.max(dim=-1).values for step in outputs.logits])
    assert (best - golden.TENSORS["decode.greedy_logits"]).abs().max() < LOGITS


@pytest.mark.parametrize("name", ["raw0", "raw1"])
def test_pixels_of_an_image_that_is_resized(model: Any, name: str) -> None:
    picture = Image.fromarray(golden.image(name))
    pixels = QwenVLImageProcessor()(images=[picture], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 448, 448)
    assert pixels.dtype == torch.float32
    recorded = golden.TENSORS[f"transform.{name}.pixel_values_slice"]
    assert (pixels[0, :, 200:216, 200:216] - recorded).abs().max() < PIXELS
    levels = (pixels[0].permute(1, 2, 0).numpy() * golden.STD + golden.MEAN) * 255
    digest = hashlib.sha256(np.rint(levels).astype(np.uint8).tobytes()).hexdigest()
    assert digest == golden.RECORD["images"]["items"][name]["resized_448_uint8_sha256"]
    with torch.no_grad():
        features = model.transformer.visual(pixels)
    recorded = golden.TENSORS[f"transform.{name}.vision_features_slice"]
    assert (features[0, ::32, :32] - recorded).abs().max() < LOGITS


def test_the_resamplers_positions_are_made_as_they_were() -> None:
    recorded = golden.TENSORS["transformer.visual.attn_pool.pos_embed"]
    assert torch.equal(sinusoid_table(recorded.shape[1], recorded.shape[0]), recorded)
