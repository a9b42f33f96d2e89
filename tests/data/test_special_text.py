"""Texts that spell special tokens never become them, whatever they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.conftest import make_sample
from tests.tiny import SPECIAL_TOKENS, build_tiny_processor, write_image
from transformers import LlavaProcessor

from eightgig.data.batch import IGNORE_INDEX
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.registry.llava import LlavaFamily

NUM_IMAGE_TOKENS = 4

# Specials whole, in pieces that only join to one, nested; roles of the template; blanks, other scripts, any letter.
FRAGMENTS = [
    *SPECIAL_TOKENS,
    *(
        "<",
        ">",
        "<im",
        "age>",
        "<<image>image>",
        "</",
        "s>",
        "< s>",
        "ASSISTANT:",
        "USER: ",
        "\n",
        " ",
        "\ue0000\ue001",
    ),
    *("你好", "ＡＢ", "＜image＞", "🙂", "é", "\u2028"),
]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
WORDS = TEXT.map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("images") / "a.png", size=(16, 16))


@settings(max_examples=300)
@given(question=WORDS, answer=WORDS, system=WORDS, num_images=st.integers(0, 3))
def test_only_the_template_writes_special_tokens(
    encoder: Encoder, processor: LlavaProcessor, image: Path, question: str, answer: str, system: str, num_images: int
) -> None:
    sample = make_sample(("system", system), ("user", [*([image] * num_images), question]), ("assistant", answer))
    encoded = encoder.encode(sample)
    ids = encoded.input_ids.tolist()
    special = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    pad, start, end, unknown, image_id = (ids.count(token_id) for token_id in special)
    assert (pad, start, end, unknown) == (0, 1, 1, 0)
    assert image_id == num_images * NUM_IMAGE_TOKENS
    supervised = [token_id for token_id in encoded.labels.tolist() if token_id != IGNORE_INDEX]
    assert supervised[-1] == processor.tokenizer.eos_token_id
    learnt = processor.tokenizer.decode(supervised[:-1], clean_up_tokenization_spaces=False)
    assert learnt.replace(" ", "") == answer.replace(" ", "")  # nothing but blanks was put in


@given(first=TEXT, second=TEXT, answer=WORDS)
def test_texts_that_join_are_refused_or_harmless(
    ending_encoder: Encoder, ending_processor: LlavaProcessor, image: Path, first: str, second: str, answer: str
) -> None:
    """This template writes the parts of a message without anything between them."""
    sample = make_sample(("user", [image, first, second]), ("assistant", answer))
    image_id = ending_processor.tokenizer.convert_tokens_to_ids("<image>")
    joined = first.strip() + second.strip()
    if any(token in joined and token not in first and token not in second for token in SPECIAL_TOKENS):
        with pytest.raises(SampleProblem) as caught:
            ending_encoder.encode(sample)
        assert caught.value.code == ProblemCode.SPECIAL_TOKEN
        return
    ids = ending_encoder.encode(sample).input_ids.tolist()
    assert ids.count(image_id) == NUM_IMAGE_TOKENS
    assert ids.count(ending_processor.tokenizer.eos_token_id) == 2


def test_escapes_are_counted(encoder: Encoder, processor: LlavaProcessor) -> None:
    sample = make_sample(("user", "Is <image> or </s> HTML?"), ("assistant", "<<image>image> is not"))
    measure = encoder.measure(sample)
    assert measure.num_escaped == 3
    text = processor.tokenizer.decode(encoder.encode(sample).input_ids)
    assert "Is < image> or < /s> HTML?" in text
    assert "<< image>image> is not" in text


def test_texts_that_spell_a_token_together_are_refused(ending_encoder: Encoder) -> None:
    with pytest.raises(SampleProblem, match="together spell the special token <image>") as caught:
        ending_encoder.encode(make_sample(("user", ["<ima", "ge>"]), ("assistant", "a")))
    assert caught.value.code == ProblemCode.SPECIAL_TOKEN


def test_markers_in_the_text_do_not_mislead(encoder: Encoder, processor: LlavaProcessor) -> None:
    """The stand-ins for texts while rendering are private-use characters, which a text may hold too."""
    sample = make_sample(("user", "\ue0001\ue001"), ("assistant", "\ue0000\ue001 ASSISTANT: x"))
    supervised = [token_id for token_id in encoder.encode(sample).labels.tolist() if token_id != IGNORE_INDEX]
    assert processor.tokenizer.decode(supervised) == " \ue0000\ue001 ASSISTANT: x</s>"


def test_the_image_token_may_have_another_name() -> None:
    """Data files write `<image>`; to a model with another token that is plain text, and its own token is escaped."""
    processor = build_tiny_processor(
        image_px=16, chat_template="{% for m in messages %}{{ m.content[-1].text }}{{ '\n' }}{% endfor %}"
    )
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|pic|>"]})

    class OtherFamily(LlavaFamily):
        image_placeholder = "<|pic|>"

    encoder = Encoder(processor, OtherFamily(), max_length=99)
    measure = encoder.measure(make_sample(("user", "<|pic|> and <image>"), ("assistant", "a")))
    assert measure.num_escaped == 2
