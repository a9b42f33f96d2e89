"""Tokens and labels of whole samples, written out by hand: one list of (token, supervised) for each data shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.conftest import make_sample
from tests.tiny import build_tiny_processor, write_image, write_jsonl
from transformers import LlavaProcessor

from eightgig.core.errors import UnsupportedModel
from eightgig.data.batch import IGNORE_INDEX, EncodedSample
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import ProblemCode, Quarantine, SampleProblem
from eightgig.data.sources import load_samples
from eightgig.registry.llava import LlavaFamily

# In the byte-level alphabet Ġ is a blank and Ċ a line feed. A token marked * is supervised.
IMAGE = "<image> <image> <image> <image>"  # a 16 px image in 8 px patches


def expected(marked_tokens: str, processor: LlavaProcessor) -> tuple[list[int], list[int]]:
    """Ids and labels of tokens written out, `*` behind those that count in the loss."""
    words = marked_tokens.split()
    ids = [processor.tokenizer.convert_tokens_to_ids(word.removesuffix("*")) for word in words]
    assert processor.tokenizer.unk_token_id not in ids
    return ids, [token_id if word.endswith("*") else IGNORE_INDEX for token_id, word in zip(ids, words, strict=True)]


def encode_file(path: Path, encoder: Encoder, quarantine: Quarantine) -> EncodedSample:
    (sample,) = load_samples(path, None, quarantine).samples
    return encoder.encode(sample)


def check_encoding(encoded: EncodedSample, marked_tokens: str, processor: LlavaProcessor) -> None:
    ids, labels = expected(marked_tokens, processor)
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == labels
    assert encoded.input_ids.dtype == encoded.labels.dtype == torch.int64


def test_llava_shape(tmp_path: Path, encoder: Encoder, processor: LlavaProcessor, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png")
    turns = [
        {"from": "system", "value": "You are."},
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "How many?"},
        {"from": "gpt", "value": "seven bars"},
    ]
    path = write_jsonl(tmp_path / "train.jsonl", [{"image": "a.png", "conversations": turns}])
    check_encoding(
        encode_file(path, encoder, quarantine),
        f"<s> You Ġare . Ġ USER : Ġ {IMAGE} Ċ What Ġis Ġi t ? ĠASSISTANT : Ġred* </s>* "
        "Ġ USER : Ġ How Ġmany ? ĠASSISTANT : Ġseven* Ġbars* </s>* Ġ",
        processor,
    )


def test_chat_shape(tmp_path: Path, encoder: Encoder, processor: LlavaProcessor, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png", seed=1)
    write_image(tmp_path / "b.png", seed=2)
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "How many bars?"},
        {"type": "image", "path": "b.png"},
    ]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "2"}]}
    encoded = encode_file(write_jsonl(tmp_path / "train.jsonl", [record]), encoder, quarantine)
    check_encoding(
        encoded,
        f"<s> USER : Ġ {IMAGE} Ċ {IMAGE} Ċ How Ġmany Ġbars ? ĠASSISTANT : Ġ2* </s>* Ġ",
        processor,
    )
    assert encoded.num_images == 2
    assert encoded.image_inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_flat_shape(tmp_path: Path, encoder: Encoder, processor: LlavaProcessor, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": "A red bar."}]))
    check_encoding(
        encode_file(path, encoder, quarantine),
        f"<s> USER : Ġ {IMAGE} Ċ Describe Ġthe Ġimage . ĠASSISTANT : ĠA* Ġred* Ġbar* .* </s>* Ġ",
        processor,
    )


def test_captioned_folder(tmp_path: Path, encoder: Encoder, processor: LlavaProcessor, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("A green rod.\n")
    check_encoding(
        encode_file(tmp_path, encoder, quarantine),
        f"<s> USER : Ġ {IMAGE} Ċ Describe Ġthe Ġimage . ĠASSISTANT : ĠA* Ġgreen* Ġrod* .* </s>* Ġ",
        processor,
    )


def test_text_without_image(encoder: Encoder, processor: LlavaProcessor) -> None:
    encoded = encoder.encode(make_sample(("user", "How many?"), ("assistant", "2")))
    check_encoding(encoded, "<s> USER : Ġ How Ġmany ? ĠASSISTANT : Ġ2* </s>* Ġ", processor)
    assert encoded.num_images == 0
    assert encoded.image_inputs == {}


def test_a_blank_that_the_model_has_to_write_is_learnt(encoder: Encoder, processor: LlavaProcessor) -> None:
    """Where the blank after `ASSISTANT:` is a token of its own, generation starts with it, so it must be learnt."""
    encoded = encoder.encode(make_sample(("user", "Q"), ("assistant", "你")))
    check_encoding(encoded, "<s> USER : Ġ Q ĠASSISTANT : Ġ* ä* ½* ł* </s>* Ġ", processor)


def test_a_template_that_writes_the_end_itself(
    tmp_path: Path, ending_encoder: Encoder, ending_processor: LlavaProcessor
) -> None:
    """The user's own end token counts as markup, the assistant's as the end of the answer; images keep their place."""
    image = write_image(tmp_path / "a.png")
    encoded = ending_encoder.encode(make_sample(("user", ["What", image, "is it?"]), ("assistant", "red 2")))
    user, assistant = "[ u s er ] Ċ", "[ a ss istan t ] Ċ"
    check_encoding(
        encoded,
        f"<s> {user} What {IMAGE} is Ġi t ? </s> Ċ {assistant} re* d* Ġ2* </s>* Ċ",
        ending_processor,
    )


def test_the_start_token_is_written_once(processor: LlavaProcessor) -> None:
    """By the template or by the tokenizer, whoever does."""
    template = "{{ '<s>' }}" + processor.chat_template
    own_start = build_tiny_processor(image_px=16, patch_px=8, chat_template=template)
    sample = make_sample(("user", "Q"), ("assistant", "2"))
    by_tokenizer = Encoder(processor, LlavaFamily(), max_length=99).encode(sample)
    by_template = Encoder(own_start, LlavaFamily(), max_length=99).encode(sample)
    assert by_template.input_ids.tolist() == by_tokenizer.input_ids.tolist()
    assert by_tokenizer.input_ids.tolist().count(processor.tokenizer.bos_token_id) == 1
    assert by_tokenizer.input_ids[0] == processor.tokenizer.bos_token_id


@pytest.mark.parametrize("ends_itself", [False, True])
def test_prompts_are_what_the_answers_were_learnt_after(
    tmp_path: Path, encoder: Encoder, ending_encoder: Encoder, *, ends_itself: bool
) -> None:
    """For each answer: the prompt's tokens, then the answer's supervised ones, are the training sample's tokens."""
    chosen = ending_encoder if ends_itself else encoder
    image = write_image(tmp_path / "a.png")
    sample = make_sample(
        ("system", "You are."),
        ("user", [image, "What is it?"]),
        ("assistant", "It is red."),
        ("user", "How many?"),
        ("assistant", "seven"),
    )
    encoded = chosen.encode(sample)
    for turn in (2, 4):
        prompt = chosen.encode_prompt(sample.messages[:turn])
        length = len(prompt.input_ids)
        assert prompt.labels.tolist() == [IGNORE_INDEX] * length
        assert prompt.input_ids.tolist() == encoded.input_ids[:length].tolist()
        assert encoded.labels[length - 1] == IGNORE_INDEX
        assert encoded.labels[length] == encoded.input_ids[length]
    assert torch.equal(prompt.image_inputs["pixel_values"], encoded.image_inputs["pixel_values"])


def test_pixels_and_tokens_equal_the_processors_own(tmp_path: Path, encoder: Encoder, processor: Any) -> None:
    from PIL import Image

    path = write_image(tmp_path / "a.png", size=(50, 31))
    encoded = encoder.encode(make_sample(("user", [path, "What?"]), ("assistant", "red")))
    with Image.open(path) as image:
        reference = processor(images=image, text="USER: <image>\nWhat? ASSISTANT: red</s> ", return_tensors="pt")
    assert torch.equal(encoded.input_ids, reference["input_ids"][0])
    assert torch.equal(encoded.image_inputs["pixel_values"], reference["pixel_values"])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content[-1].text | upper }}{% endfor %}", "alters a message's text"),
        ("{{ messages[0].content[-1].text }}", "leaves out, repeats or reorders"),
        ("{% for m in messages %}{{ m.content[-1].text * 2 }}{% endfor %}", "leaves out, repeats or reorders"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses this conversation: Roles must alternate"),
    ],
)
def test_templates_that_make_answers_uncertain(template: str, reason: str) -> None:
    encoder = Encoder(build_tiny_processor(chat_template=template), LlavaFamily(), max_length=99)
    with pytest.raises(SampleProblem) as caught:
        encoder.encode(make_sample(("user", "q"), ("assistant", "a")))
    assert caught.value.code == ProblemCode.TEMPLATE_MISMATCH
    assert reason in caught.value.reason


def test_a_template_that_loses_images(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    encoder = Encoder(build_tiny_processor(chat_template=template), LlavaFamily(), max_length=99)
    with pytest.raises(SampleProblem, match="writes 0 image placeholders for 1 images") as caught:
        encoder.encode(make_sample(("user", [write_image(tmp_path / "a.png"), "q"]), ("assistant", "a")))
    assert caught.value.code == ProblemCode.PLACEHOLDER_MISMATCH


def test_processors_that_labels_cannot_be_made_with(processor: LlavaProcessor) -> None:
    bare = build_tiny_processor(chat_template="")
    with pytest.raises(UnsupportedModel, match="no chat template"):
        Encoder(bare, LlavaFamily(), max_length=99)

    class OtherFamily(LlavaFamily):
        end_of_turn = "<|im_end|>"

    with pytest.raises(UnsupportedModel, match=r"writes the end of a turn, <\|im_end\|>, as tokens \["):
        Encoder(processor, OtherFamily(), max_length=99)


def test_the_tokenizers_template_serves_where_the_processor_has_none(processor: LlavaProcessor) -> None:
    other = build_tiny_processor(image_px=16, patch_px=8)
    other.tokenizer.chat_template, other.chat_template = other.chat_template, None
    sample = make_sample(("user", "Q"), ("assistant", "2"))
    encoded = Encoder(other, LlavaFamily(), max_length=99).encode(sample)
    check_encoding(encoded, "<s> USER : Ġ Q ĠASSISTANT : Ġ2* </s>* Ġ", processor)


def test_what_generation_needs_of_the_tokenizer(encoder: Encoder, processor: LlavaProcessor) -> None:
    assert encoder.end_token_ids == [processor.tokenizer.eos_token_id]
    assert encoder.pad_token_id == processor.tokenizer.pad_token_id
    padless = build_tiny_processor()
    padless.tokenizer.pad_token = None
    assert Encoder(padless, LlavaFamily(), max_length=99).pad_token_id == padless.tokenizer.eos_token_id
