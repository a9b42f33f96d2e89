"""InstructBLIP beside the shared checks: one image against the processor's own call, and models that are refused."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import InstructBlipProcessor, LlamaTokenizer

import tiny
from eightgig.core.errors import UnsupportedModel
from eightgig.data.encode import Encoder
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.registry.instructblip import MAX_QUESTION_TOKENS, InstructBlipFamily
from tiny_families.instructblip import FACTS

FAMILY = InstructBlipFamily()


def _user(*parts: Any) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else ImagePart(path=part) for part in parts))


def _llama_tokenizer(is_legacy: bool) -> LlamaTokenizer:
    """One token a letter, but for two words' beginnings, with the published one's start and end."""
    symbols = ["<unk>", "<s>", "</s>", "▁", *string.printable, "▁W", "▁A"]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=[("▁", "W"), ("▁", "A")], legacy=is_legacy, bos_token="</s>", unk_token="</s>"
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return tokenizer


@pytest.mark.parametrize("is_legacy", [True, False])
def test_a_prompt_with_one_image_is_the_processors_own(tmp_path: Path, is_legacy: bool) -> None:
    standin = FAMILY.build_processor(FACTS)
    processor = InstructBlipProcessor(
        standin.image_processor, _llama_tokenizer(is_legacy), standin.qformer_tokenizer, num_query_tokens=4
    )
    path = tiny.write_image(tmp_path / "a.png", (53, 37))
    question = "What is it, an apple?"
    ours = Encoder(processor, FAMILY, max_length=512).encode_prompt([_user(path, question)])
    own = processor(images=Image.open(path), text=question, return_tensors="pt")
    assert set(own) == {"input_ids", "attention_mask", *ours.image_inputs}
    assert processor.tokenizer.decode(ours.input_ids[4]) == "</s>"
    assert ours.input_ids.tolist() == own["input_ids"][0].tolist()
    for name, value in ours.image_inputs.items():
        torch.testing.assert_close(value, own[name])


def test_the_q_former_reads_what_comes_before_the_first_answer_once_an_image(tmp_path: Path) -> None:
    processor = FAMILY.build_processor(FACTS)
    path = tiny.write_image(tmp_path / "a.png", (53, 37))
    messages = (
        _user(path, path, "First?"),
        Message("assistant", (TextPart("One."),)),
        _user("Second?", path),
        Message("assistant", (TextPart("Two."),)),
    )
    encoded = Encoder(processor, FAMILY, max_length=512).encode(Sample("x", messages, SourceRef(Path("x"), 1)))
    read = encoded.image_inputs["qformer_input_ids"]
    assert read.tolist() == [processor.qformer_tokenizer("First?")["input_ids"]] * 3
    image = "<image>" * FACTS.architecture["num_query_tokens"]
    expected = f"{image}{image}</s> First? One.</s>{image} Second? Two.</s>"
    assert processor.tokenizer.decode(encoded.input_ids) == expected


def test_a_long_question_fits_the_q_formers_positions() -> None:
    inputs = FAMILY.prompt_inputs(FAMILY.build_processor(FACTS), "why " * MAX_QUESTION_TOKENS, 2)
    assert {tuple(value.shape) for value in inputs.values()} == {(2, MAX_QUESTION_TOKENS)}


def test_a_model_with_another_language_model_is_refused() -> None:
    config = {**FACTS.architecture, "text_config": {"model_type": "t5"}}
    with pytest.raises(UnsupportedModel, match="language model is a t5"):
        FAMILY.facts_from_config(config, name="flan", folder=None, hub_id="x/flan")
