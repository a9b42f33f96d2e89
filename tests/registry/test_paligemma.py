"""PaliGemma beside the shared checks: its inputs, what sees what, and the cap of its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tiny
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.registry.facts import as_dicts
from eightgig.registry.paligemma import PALIGEMMA_2_3B, PaliGemmaFamily
from tiny_families.paligemma import FACTS

FAMILY = PaliGemmaFamily()
SIZES = ((53, 37), (29, 61))


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = AutoModelForImageTextToText.from_config(
            FAMILY.build_config(FACTS), dtype=torch.float32, attn_implementation=as_dicts(FAMILY.attention)
        )
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_(0.0, 0.2)
    return built.eval()


def _messages(folder: Path, answer: str | None = None) -> tuple[Message, ...]:
    paths = [tiny.write_image(folder / f"{size[0]}.png", size, seed=size[0]) for size in SIZES]
    question = Message("user", (*(ImagePart(path=path) for path in paths), TextPart("What is it?")))
    return (question,) if answer is None else (question, Message("assistant", (TextPart(answer),)))


def _sample(folder: Path, answer: str) -> Sample:
    return Sample("x", _messages(folder, answer), SourceRef(Path("x"), 1))


def test_a_prompt_is_the_processors_own(tmp_path: Path) -> None:
    FAMILY.build_processor(FACTS).save_pretrained(tmp_path / "processor")
    processor = AutoProcessor.from_pretrained(tmp_path / "processor")
    encoder = Encoder(processor, FAMILY, max_length=512)
    ours = collate([encoder.encode_prompt(_messages(tmp_path))], encoder.pad_token_id).model_inputs
    images = [Image.open(tmp_path / f"{size[0]}.png") for size in SIZES]
    own = processor(images=[images], text=["<image><image>What is it?"], return_tensors="pt")
    assert own.keys() - {"labels"} == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, own[name])


def test_an_answer_is_what_the_processor_calls_a_suffix(tmp_path: Path) -> None:
    processor = FAMILY.build_processor(FACTS)
    ours = Encoder(processor, FAMILY, max_length=512).encode(_sample(tmp_path, "A bar."))
    images = [Image.open(tmp_path / f"{size[0]}.png") for size in SIZES]
    own = processor(images=[images], text=["<image><image>What is it?"], suffix=["A bar."], return_tensors="pt")
    # The stand-in's tokenizer writes a start token before each of two texts; the published one before none.
    is_kept = torch.ones_like(own["input_ids"][0]).bool()
    starts = (own["input_ids"][0] == processor.tokenizer.bos_token_id).nonzero().flatten()
    is_kept[starts[[position for position in range(len(starts)) if position != len(starts) // 2]]] = False
    assert ours.input_ids.tolist() == own["input_ids"][0][is_kept].tolist()
    assert ours.token_inputs["token_type_ids"].tolist() == own["token_type_ids"][0][is_kept].tolist()
    assert ours.labels.tolist() == own["labels"][0][is_kept].tolist()


def test_the_question_is_seen_both_ways_and_the_answer_backwards_only(model: Any, tmp_path: Path) -> None:
    encoder = Encoder(FAMILY.build_processor(FACTS), FAMILY, max_length=512)
    long, short = (encoder.encode(_sample(tmp_path, answer)) for answer in ("A red bar.", "No."))
    inputs = dict(collate([long], encoder.pad_token_id).model_inputs)
    start = int(inputs["token_type_ids"].argmax())

    def states(**changed: Tensor) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = FAMILY.hidden_states(model, {**inputs, **changed})[0]
        return hidden

    def with_other_token(position: int) -> Tensor:
        ids = inputs["input_ids"].clone()
        ids[0, position] += 1
        return ids

    before = states()
    after_question = states(input_ids=with_other_token(start - 2))
    assert (after_question - before).norm(dim=1).min() > 1e-4  # the first image token sees the question's end
    after_answer = states(input_ids=with_other_token(start + 2))
    torch.testing.assert_close(after_answer[: start + 2], before[: start + 2])
    assert (after_answer - before)[start + 2 :].norm(dim=1).min() > 1e-4
    together = collate([long, short], encoder.pad_token_id).model_inputs
    alone = collate([short], encoder.pad_token_id).model_inputs
    with torch.no_grad():
        padded, whole = FAMILY.hidden_states(model, together)[1], FAMILY.hidden_states(model, alone)[0]
    torch.testing.assert_close(padded[: len(whole)], whole, rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_the_models_own_forward(model: Any, tmp_path: Path) -> None:
    encoder = Encoder(FAMILY.build_processor(FACTS), FAMILY, max_length=512)
    inputs = collate([encoder.encode(_sample(tmp_path, "A bar."))], encoder.pad_token_id).model_inputs
    with torch.no_grad():
        hidden = FAMILY.hidden_states(model, inputs)
        uncapped = model.lm_head(hidden)
        own = model(**inputs, use_cache=False).logits
    assert uncapped.abs().max() > FACTS.architecture["text_config"]["final_logit_softcapping"]
    torch.testing.assert_close(FAMILY.logits(model, hidden), own)


def test_the_stand_in_has_the_marks_of_places_at_the_published_ids() -> None:
    tokenizer = FAMILY.build_processor(PALIGEMMA_2_3B).tokenizer
    assert tokenizer.convert_tokens_to_ids(["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", "<image>"]) == [
        256000,
        257023,
        257024,
        257151,
        257152,
    ]
    assert len(tokenizer) <= PALIGEMMA_2_3B.architecture["text_config"]["vocab_size"]
    encoder = Encoder(FAMILY.build_processor(PALIGEMMA_2_3B), FAMILY, max_length=512)
    answer = "<loc0010><loc0020><loc0500><loc1023> car"
    messages = (Message("user", (TextPart("detect car"),)), Message("assistant", (TextPart(answer),)))
    encoded = encoder.encode(Sample("x", messages, SourceRef(Path("x"), 1)))
    assert encoder.tokenizer.decode(encoded.input_ids[encoded.labels >= 0]) == f"{answer}<eos>"
