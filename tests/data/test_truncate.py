"""Cutting over-long samples: worked examples by hand, and what holds for any sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import make_sample
from tests.tiny import write_image
from transformers import LlavaProcessor

from eightgig.data.batch import IGNORE_INDEX
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.spans import Kind
from eightgig.data.truncate import cut_to_length
from eightgig.registry.llava import LlavaFamily

LETTERS = {"m": Kind.MARKUP, "p": Kind.PROMPT, "a": Kind.ANSWER, "e": Kind.END, "i": Kind.IMAGE}


def cut(tokens: str, max_length: int) -> tuple[str, str]:
    """The tokens that stay, one letter each, and a * under each that is supervised. A new answer starts after an e."""
    kinds = np.array([int(LETTERS[letter]) for letter in tokens])
    num_ends = np.cumsum(kinds == Kind.END) - (kinds == Kind.END)
    answers = np.where((kinds == Kind.ANSWER) | (kinds == Kind.END), num_ends, -1)
    result = cut_to_length(kinds, answers, max_length)
    stay = [letter for letter, keep in zip(tokens, result.keep, strict=True) if keep]
    marks = ["*" if mark else "." for mark, keep in zip(result.supervised, result.keep, strict=True) if keep]
    assert result.num_prompt_tokens == tokens.count("p") - stay.count("p")
    assert result.num_answer_tokens == tokens.count("a") - stay.count("a")
    assert not (result.supervised & ~result.keep).any()
    return "".join(stay), "".join(marks)


@pytest.mark.parametrize(
    ("tokens", "max_length", "stay", "marks"),
    [
        ("miiiippmaae", 7, "miiiippmaae", ".......****"[:7] + "." + "***"),
        ("miiiippmaae", 6, "miiiipmaae", ".......***"),
        ("miiiippmaae", 5, "miiiimaae", "......***"),
        ("miiiippmaae", 4, "miiiimae", "......*."),
        ("mppmaempppmaae", 14, "mppmaempppmaae", "....**.....***"),
        ("mppmaempppmaae", 11, "mmaemppmaae", "..**....***"),
        ("mppmaempppmaae", 9, "mmaemmaae", "..**..***"),
        ("mppmaempppmaae", 8, "mmaemmae", "..**..*."),
        ("mpmaaaemmaae", 10, "mmaaaemmae", "..****..*."),
        ("mpmaaaemmaae", 8, "mmaemmae", "..*...*."),
    ],
)
def test_worked_examples(tokens: str, max_length: int, stay: str, marks: str) -> None:
    assert cut(tokens, max_length) == (stay, marks)


def test_markup_alone_too_long() -> None:
    with pytest.raises(SampleProblem, match="own 3 tokens leave no room for an answer within max_length = 4") as caught:
        cut("mmpmaae", 4)
    assert caught.value.code == ProblemCode.TOO_LONG


@given(tokens=st.text(alphabet="mmppaei", min_size=1, max_size=60), max_length=st.integers(1, 60))
def test_what_holds_for_any_sample(tokens: str, max_length: int) -> None:
    tokens += "ae"
    try:
        stay, marks = cut(tokens, max_length)
    except SampleProblem as problem:
        too_long = problem.code == ProblemCode.TOO_LONG
        first_tokens = sum(part.count("a") > 0 for part in tokens.split("e"))
        least = tokens.count("m") + tokens.count("e") + first_tokens
        assert (too_long, least > max_length) == (True, True)
        return
    for letter in "mei":
        assert stay.count(letter) == tokens.count(letter)
    num_text = len(stay) - stay.count("i")
    assert num_text <= max(max_length, 0) or num_text == len(tokens) - tokens.count("i") <= max_length
    if stay.count("a") < tokens.count("a"):
        assert "p" not in stay
    if len(stay) < len(tokens):
        assert num_text == max_length
    assert "*" in marks


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("images") / "a.png")


def test_the_limit_counts_text_tokens_only(processor: LlavaProcessor, encoder: Encoder, image: Path) -> None:
    sample = make_sample(("user", [image, image, "How many bars are there?"]), ("assistant", "seven bars"))
    whole = encoder.encode(sample)
    num_text = len(whole.input_ids) - 2 * 4
    just_fits = Encoder(processor, LlavaFamily(), max_length=num_text).encode(sample)
    assert just_fits.input_ids.tolist() == whole.input_ids.tolist()
    assert (just_fits.num_cut_prompt_tokens, just_fits.num_cut_answer_tokens) == (0, 0)
    shorter = Encoder(processor, LlavaFamily(), max_length=num_text - 3).encode(sample)
    assert (shorter.num_cut_prompt_tokens, shorter.num_cut_answer_tokens) == (3, 0)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert shorter.input_ids.tolist().count(image_id) == 8
    assert "".join(processor.tokenizer.decode(shorter.input_ids).split("<image>")).endswith(
        "are there? ASSISTANT: seven bars</s> "
    )


@given(
    system=st.text("ab ", max_size=20),
    question=st.text("ab é你<>", min_size=1, max_size=30).filter(str.strip),
    answers=st.lists(st.text("ab 你", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=3),
    max_length=st.integers(8, 90),
)
def test_labels_stay_with_their_tokens(
    processor: LlavaProcessor,
    encoder: Encoder,
    image: Path,
    system: str,
    question: str,
    answers: list[str],
    max_length: int,
) -> None:
    turns: list[tuple[str, str | list[str | Path]]] = [("system", system)] if system.strip() else []
    for index, answer in enumerate(answers):
        turns += [("user", [image, question] if index == 0 else question), ("assistant", answer)]
    sample = make_sample(*turns)
    whole = encoder.encode(sample)
    short_encoder = Encoder(processor, LlavaFamily(), max_length=max_length)
    try:
        short = short_encoder.encode(sample)
    except SampleProblem as problem:
        code = problem.code
        assert code == ProblemCode.TOO_LONG
        return
    supervised = short.labels != IGNORE_INDEX
    assert short.labels[supervised].tolist() == short.input_ids[supervised].tolist()
    assert len(short.input_ids) - 4 <= max_length
    num_cut = short.num_cut_prompt_tokens + short.num_cut_answer_tokens
    assert len(whole.input_ids) - len(short.input_ids) == num_cut
    if short.num_cut_answer_tokens == 0:
        assert short.labels[supervised].tolist() == whole.labels[whole.labels != IGNORE_INDEX].tolist()
    measure = short_encoder.measure(sample)
    assert measure.num_text_tokens == len(short.input_ids) - 4
    assert measure.num_supervised_tokens == int(supervised.sum())
    assert (measure.num_cut_prompt_tokens, measure.num_cut_answer_tokens) == (
        short.num_cut_prompt_tokens,
        short.num_cut_answer_tokens,
    )


def test_prompts_are_shortened_too(processor: LlavaProcessor, image: Path) -> None:
    sample = make_sample(
        ("user", [image, "How many bars are there in the picture?"]),
        ("assistant", "There are seven bars in the picture."),
        ("user", "Describe the bar."),
        ("assistant", "red"),
    )
    prompt = Encoder(processor, LlavaFamily(), max_length=30).encode_prompt(sample.messages[:3])
    assert len(prompt.input_ids) == 30 + 4
    assert prompt.num_cut_prompt_tokens > 0
    assert processor.tokenizer.decode(prompt.input_ids).endswith("Describe the bar. ASSISTANT:")
