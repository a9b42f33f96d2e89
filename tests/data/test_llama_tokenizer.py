"""Labels with a tokenizer built as Llama's is (blanks as ▁, byte fallback), the kind that LLaVA-1.5 comes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.data.conftest import make_sample
from tests.tiny import PUBLISHED_TEMPLATE, SPECIAL_TOKENS, build_tiny_processor, write_image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from eightgig.data.batch import IGNORE_INDEX
from eightgig.data.encode import Encoder
from eightgig.registry.llava import LlavaFamily

CORPUS = ("USER: What is it? ASSISTANT: It is red.", "A red bar is there. How many bars? seven", "1 2 3 4")


def llama_like_processor(kind: str) -> LlavaProcessor:
    """`legacy` puts a ▁ in front of every stretch between special tokens, `first` only in front of the text."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS * 5, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    words = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=build_tiny_processor(image_px=16).image_processor,
        tokenizer=fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PUBLISHED_TEMPLATE,
    )


@pytest.fixture(scope="module", params=["legacy", "first"])
def llama_like(request: pytest.FixtureRequest) -> LlavaProcessor:
    return llama_like_processor(request.param)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("images") / "a.png")


def supervised_text(processor: LlavaProcessor, labels: list[int]) -> str:
    ids = [token_id for token_id in labels if token_id != IGNORE_INDEX]
    text: str = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def test_tokens_equal_the_processors_own(llama_like: Any, image: Path) -> None:
    sample = make_sample(
        ("user", [image, "What is it?"]), ("assistant", "It is red."), ("user", "Q"), ("assistant", "你")
    )
    encoded = Encoder(llama_like, LlavaFamily(), max_length=999).encode(sample)
    text = "USER: <image>\nWhat is it? ASSISTANT: It is red.</s> USER: Q ASSISTANT: 你</s> "
    with Image.open(image) as pixels:
        reference = llama_like(images=pixels, text=text, return_tensors="pt")
    assert encoded.input_ids.tolist() == reference["input_ids"][0].tolist()
    marked = zip(
        llama_like.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()), encoded.labels.tolist(), strict=True
    )
    supervised = [token for token, label in marked if label != IGNORE_INDEX]
    assert supervised == ["▁It", "▁is", "▁red.", "</s>", "▁", "<0xE4>", "<0xBD>", "<0xA0>", "</s>"]


WORDS = st.text(alphabet="ab 你é1<>▁.\n", min_size=1, max_size=20).map(str.strip).filter(bool)


@given(questions=st.lists(WORDS, min_size=1, max_size=3), answer=WORDS)
def test_answers_and_nothing_else_are_supervised(
    llama_like: Any, image: Path, questions: list[str], answer: str
) -> None:
    turns: list[tuple[str, str | list[str | Path]]] = []
    for index, question in enumerate(questions):
        turns += [("user", [image, question] if index == 0 else question), ("assistant", answer)]
    sample = make_sample(*turns)
    encoder = Encoder(llama_like, LlavaFamily(), max_length=999)
    encoded = encoder.encode(sample)
    wanted = f" {answer}</s>".replace("▁", " ") * len(questions)  # ▁ decodes to a blank by the tokenizer's design
    assert supervised_text(llama_like, encoded.labels.tolist()) == wanted
    for turn in range(1, len(sample.messages), 2):
        prompt = encoder.encode_prompt(sample.messages[:turn])
        length = len(prompt.input_ids)
        assert encoded.input_ids[:length].tolist() == prompt.input_ids.tolist()
        assert (encoded.labels[length - 1] == IGNORE_INDEX, encoded.labels[length] != IGNORE_INDEX) == (True, True)
