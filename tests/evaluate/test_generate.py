"""Greedy answers against a loop of full forward passes, whatever shares their batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eightgig.data.sample import Message, Sample, SourceRef, TextPart
from eightgig.evaluate.generate import Generation, answer_prompts, first_exchange, generate_answers

MAX_NEW_TOKENS = 6


def _answer_by_hand(scene: Any, sample: Sample) -> str:
    """The likeliest token again and again, each from a forward pass over everything before it."""
    model = scene.loaded.model.eval()
    messages, _ = first_exchange(sample)
    prompt = scene.encoder.encode_prompt(messages)
    ids = prompt.input_ids
    for _ in range(MAX_NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False, **prompt.image_inputs).logits[0, -1]
        token = logits.argmax()
        ids = torch.cat([ids, token[None]])
        if int(token) in scene.encoder.end_token_ids:
            break
    return str(scene.encoder.tokenizer.decode(ids[len(prompt.input_ids) :], skip_special_tokens=True).strip())


def _generate(scene: Any, batch_size: int, samples: Any = None) -> list[Generation]:
    return generate_answers(
        scene.loaded.model,
        scene.encoder,
        scene.samples if samples is None else samples,
        scene.compute,
        batch_size=batch_size,
        max_new_tokens=MAX_NEW_TOKENS,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_answers_are_the_likeliest_tokens_whatever_the_batch(scene: Any, batch_size: int) -> None:
    generations = _generate(scene, batch_size)
    assert [generation.sample_id for generation in generations] == [f"s{index}" for index in range(7)]
    assert [generation.answer for generation in generations] == [
        _answer_by_hand(scene, sample) for sample in scene.samples
    ]
    assert len({generation.answer for generation in generations}) > 1


def test_what_was_asked_and_hoped_for_stands_beside_the_answer(scene: Any) -> None:
    first, second, *_ = _generate(scene, 3)
    assert (first.question, first.expected) == ("What is it?", "It is red.")
    assert (second.question, second.expected) == ("What is it and where?", "It is very red.")
    assert [image.endswith("1.png") for image in second.images] == [True]
    assert not first.correct
    assert Generation("s", (), "q", "It is red.", "  it is RED").correct


def test_an_answer_ends_at_the_end_of_turn(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first token that the model would say as the end of a turn, nothing comes after it."""
    messages, _ = first_exchange(scene.samples[0])
    prompt = scene.encoder.encode_prompt(messages)
    with torch.no_grad():
        first = (
            scene.loaded.model.eval()(input_ids=prompt.input_ids[None], **prompt.image_inputs).logits[0, -1].argmax()
        )
    monkeypatch.setattr(type(scene.encoder), "end_token_ids", property(lambda self: [int(first)]))
    (answer,) = answer_prompts(scene.loaded.model, scene.encoder, [prompt], scene.compute, max_new_tokens=9)
    assert answer == scene.encoder.tokenizer.decode(first[None], skip_special_tokens=True).strip()


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_is_left_as_it_was(scene: Any, is_training: bool) -> None:
    model = scene.loaded.model.train(is_training)
    _generate(scene, 2, scene.samples[:1])
    assert model.training is is_training
    assert all(module.training is is_training for module in model.modules())
    model.eval()


def test_no_sample_no_answer(scene: Any) -> None:
    assert _generate(scene, 2, []) == []


def test_of_a_conversation_only_the_first_question_is_asked() -> None:
    def said(role: Any, text: str) -> Message:
        return Message(role, (TextPart(text),))

    messages = (said("system", "s"), said("user", "q1"), said("assistant", "a1"), said("user", "q2"))
    sample = Sample("x", (*messages, said("assistant", "a2")), SourceRef(__file__, 1))  # type: ignore[arg-type]
    assert first_exchange(sample) == (messages[:2], "a1")
