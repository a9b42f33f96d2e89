"""The pretraining script sees what the shipped model sees: the same forward pass, the same tokens, the same batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.demo_model.architecture import PretrainingForward, build_model
from benchmarks.demo_model.conversation import ROW_TOKENS, RowEncoder
from benchmarks.demo_model.feed import SceneBatches, render_batch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eightgig import registry
from eightgig.demo.scenes import render_scene

MODEL_FOLDER = registry.get("eightgig-demo").location


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


def messages_of(seed: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for index, question in enumerate(render_scene(seed).questions):
        image = [{"type": "image"}] if index == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": question.answer})
    return messages


def test_rows_are_what_the_chat_template_writes(processor: Any) -> None:
    encoder = RowEncoder(processor.tokenizer)
    for seed in range(100):
        text = processor.apply_chat_template(messages_of(seed))
        ids, is_target = encoder.encode(render_scene(seed).questions)
        assert ids == processor.tokenizer(text)["input_ids"]
        answers = "".join(f" {question.answer}</s>" for question in render_scene(seed).questions)
        targets = [token for token, target in zip(ids, is_target, strict=True) if target]
        assert processor.tokenizer.decode(targets) == answers


def test_the_forward_pass_is_the_stock_one(processor: Any) -> None:
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    text = processor.apply_chat_template(messages_of(11))
    inputs = processor(images=[render_scene(11).image], text=[text], return_tensors="pt")
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    place = ids[0].tolist().index(model.config.image_token_id)
    pixels = torch.from_numpy(np.array(render_scene(11).image)).unsqueeze(0)
    with torch.no_grad():
        ours = PretrainingForward(model, place).logits(pixels, ids)
        stock = model(**inputs).logits
    torch.testing.assert_close(ours, torch.cat([stock[:, :place], stock[:, place + 63 :]], dim=1), atol=1e-4, rtol=1e-4)


def test_batches_follow_the_seed(processor: Any) -> None:
    batches = iter(SceneBatches(processor.tokenizer, seed=900, batch_size=3))
    next(batches)
    second = next(batches)
    expected, kinds = render_batch(RowEncoder(processor.tokenizer), range(903, 906))
    assert torch.equal(second.pixels, expected.pixels)
    assert torch.equal(second.ids, expected.ids)
    assert torch.equal(second.is_target, expected.is_target)
    assert second.ids.shape == (3, ROW_TOKENS)
    assert kinds == [render_scene(seed).questions[0].kind for seed in range(903, 906)]


def test_the_script_builds_the_shipped_architecture(processor: Any) -> None:
    shipped = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER)
    built = build_model(processor.tokenizer)
    shapes = {name: weight.shape for name, weight in built.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in shipped.state_dict().items()}
