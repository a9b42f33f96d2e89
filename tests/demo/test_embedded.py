"""The embedded model: small, stock, loads without a network, and sees what held-out scenes show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eightgig import registry
from eightgig.demo.charts import deal_charts, draw_chart
from eightgig.demo.scenes import render_scene
from eightgig.demo.settings import DemoSettings

# No scene of pretraining or of the tokenizer's text has a seed from here on (benchmarks/demo_model/conversation.py).
HELD_OUT_SEED = (1 << 52) + 1_000_000
MAX_WEIGHTS_BYTES = 20_000_000
MODEL_FOLDER = Path(registry.get("eightgig-demo").location)


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_it_is_small_enough_to_ship() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_FOLDER.iterdir()}
    assert files["model.safetensors"] <= MAX_WEIGHTS_BYTES
    assert sum(files.values()) <= MAX_WEIGHTS_BYTES


def test_its_linear_layers_fit_blocks_of_nf4(model: Any) -> None:
    linears = [layer for layer in model.model.language_model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 28
    assert all(layer.in_features % 64 == 0 and layer.out_features % 32 == 0 for layer in linears)


def test_it_answers_held_out_scenes(model: Any, processor: Any) -> None:
    scenes = [render_scene(seed, max_num_questions=1) for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + 80)]
    processor.tokenizer.padding_side = "left"
    prompts = [processor.apply_chat_template(ask(s.questions[0].text), add_generation_prompt=True) for s in scenes]
    inputs = processor(images=[s.image for s in scenes], text=prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    answers = [answer.strip() for answer in processor.batch_decode(ids, skip_special_tokens=True)]
    num_right = sum(answer == scene.questions[0].answer for answer, scene in zip(answers, scenes, strict=True))
    assert num_right >= 0.9 * len(scenes)


def test_a_conversation_is_written_in_llavas_form(processor: Any) -> None:
    messages = [
        *ask("How tall is the red bar?"),
        {"role": "assistant", "content": [{"type": "text", "text": "12"}]},
        {"role": "user", "content": "And the blue one?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "USER: <image>\nHow tall is the red bar? ASSISTANT: 12</s>USER: And the blue one? ASSISTANT:"
    )


def test_each_number_is_one_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    prompt = tokenizer("USER: How many? ASSISTANT:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    for number in range(21):
        ids = tokenizer(f"USER: How many? ASSISTANT: {number}</s>")["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert len(ids) == len(prompt) + 2
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["héllo, wörld", "多少根红色的柱子?", "a\tb\n\nc  d", "🙂 42,195"])
def test_any_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids) == text


def test_a_picture_is_64_tokens_and_a_conversation_fits(processor: Any) -> None:
    longest_tokens = 0
    for chart in deal_charts("train", 200, seed=0):
        messages: list[dict[str, Any]] = []
        for index, bar in enumerate(chart.bars):
            messages += ask(bar.question) if index == 0 else [{"role": "user", "content": bar.question}]
            messages.append({"role": "assistant", "content": str(bar.value)})
        text = processor.apply_chat_template(messages)
        longest_tokens = max(longest_tokens, len(processor.tokenizer(text)["input_ids"]) - 1)
    assert longest_tokens <= DemoSettings().max_length
    inputs = processor(images=[draw_chart(chart)], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 64
