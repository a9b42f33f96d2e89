"""What a family may add to encoding: its own template with a start token in it, question inputs, token kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.conftest import make_sample
from tests.tiny import build_tiny_processor, write_image

from eightgig.core.errors import UnsupportedModel
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import SampleProblem
from eightgig.registry.llava import LlavaFamily


class _InstructFamily(LlavaFamily):
    """As InstructBLIP: no published template, image tokens before the start token, the question given to the tower."""

    chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}{% if loop.first %}<s>{% endif %}{% endif %}"
        "{% for p in m.content if p.type == 'text' %}{{ p.text + suffix }}{% endfor %}{% endfor %}"
    )
    template_arguments = {"suffix": "!"}  # noqa: RUF012
    reserved_texts = ("[stop]",)

    def prompt_inputs(self, processor: Any, question: str, num_images: int) -> Mapping[str, Any]:
        ids = processor.tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"question_ids": ids.repeat(num_images, 1)}

    def token_inputs(self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Any) -> Mapping[str, Any]:
        return {"token_type_ids": is_answer.long()}


@pytest.fixture
def encoder() -> Encoder:
    processor = build_tiny_processor(image_px=16, patch_px=8)
    processor.chat_template = None
    return Encoder(processor, _InstructFamily(), max_length=512)


def _ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_template_of_the_family_stands_in_and_its_start_token_is_the_only_one(
    encoder: Encoder, tmp_path: Path
) -> None:
    image = write_image(tmp_path / "a.png")
    encoded = encoder.encode(make_sample(("user", [image, "How many"]), ("assistant", "Two")))
    assert encoded.input_ids.tolist() == _ids(encoder, "<image>" * 4 + "<s>How many!Two</s>!")
    assert encoded.input_ids.tolist().count(encoder.tokenizer.bos_token_id) == 1
    prompt = encoder.encode_prompt(make_sample(("user", "How many")).messages)
    assert prompt.input_ids.tolist() == _ids(encoder, "<s>How many!")


def test_the_tower_gets_the_words_before_the_first_answer_once_an_image(encoder: Encoder, tmp_path: Path) -> None:
    first, second = write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png")
    turns = (("user", [first, second, "How many"]), ("assistant", "Two"), ("user", "Sure"), ("assistant", "Yes"))
    encoded = encoder.encode(make_sample(*turns))
    assert encoded.image_inputs["question_ids"].tolist() == [_ids(encoder, "How many")] * 2
    assert "question_ids" not in encoder.encode(make_sample(("user", "Hi"), ("assistant", "Ho"))).image_inputs


def test_token_inputs_follow_the_cut(tmp_path: Path) -> None:
    processor = build_tiny_processor(image_px=16, patch_px=8)
    processor.chat_template = None
    encoder = Encoder(processor, _InstructFamily(), max_length=12)
    encoded = encoder.encode(make_sample(("user", "x y z " * 20), ("assistant", "Two")))
    assert encoded.num_cut_prompt_tokens > 0
    kinds = encoded.token_inputs["token_type_ids"]
    assert kinds.shape == encoded.input_ids.shape == encoded.labels.shape
    assert torch.equal(kinds == 1, encoded.labels != -100)


def test_reserved_texts_of_the_family_are_broken_up(encoder: Encoder) -> None:
    sample = make_sample(("user", "please [stop] now"), ("assistant", "Two"))
    assert "[ stop]" in encoder.tokenizer.decode(encoder.encode(sample).input_ids)
    assert encoder.measure(sample).num_escaped == 1


def test_without_any_template_the_model_is_refused() -> None:
    processor = build_tiny_processor()
    processor.chat_template = None
    with pytest.raises(UnsupportedModel, match="no chat template"):
        Encoder(processor, LlavaFamily(), max_length=512)


def test_a_template_that_needs_another_variable_is_a_bad_sample_not_a_crash() -> None:
    class Raising(_InstructFamily):
        chat_template = "{{ raise_exception('no turns') }}"

    processor = build_tiny_processor()
    processor.chat_template = None
    with pytest.raises(SampleProblem, match="no turns"):
        Encoder(processor, Raising(), max_length=512).encode(make_sample(("user", "a"), ("assistant", "b")))
