"""From a sample to tokens, labels and image tensors."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from eightgig.core.errors import UnsupportedModel
from eightgig.data.batch import IGNORE_INDEX, EncodedSample
from eightgig.data.image_features import ImageFeatures
from eightgig.data.images import load_image
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart, Message, Sample, TextPart, images_of
from eightgig.data.spans import Kind, Piece, chat_pieces, token_kinds
from eightgig.data.truncate import Cut, cut_to_length
from eightgig.registry.facts import ImageLayout
from eightgig.registry.family import ModelFamily


@dataclass(frozen=True)
class TextMeasure:
    """What the text of one sample comes to, counted without decoding its images.

    Attributes:
        num_text_tokens: after cutting, image tokens not counted.
        num_supervised_tokens: tokens that the loss counts.
        num_cut_prompt_tokens: cut off users' and system texts to keep `max_length`.
        num_cut_answer_tokens: cut off answers, because they alone were too long.
        num_escaped: special tokens found spelled out in the texts, and broken up.
    """

    num_text_tokens: int
    num_supervised_tokens: int
    num_cut_prompt_tokens: int
    num_cut_answer_tokens: int
    num_escaped: int


@dataclass(frozen=True)
class _Text:
    """The text of one sample as tokens, before any cut: ids int64 [tokens], and the cut."""

    ids: NDArray[np.int64]
    kinds: NDArray[np.int64]
    cut: Cut
    num_escaped: int


class Encoder:
    """Turns samples into what the model takes, for one processor. Picklable: data workers get a copy.

    Args:
        processor: a transformers processor with a fast tokenizer, an image processor and a chat template.
        family: says what stands for an image and what ends an answer.
        max_length: most text tokens a sample may keep; image tokens come on top and are never cut.

    Raises:
        UnsupportedModel: no chat template, no fast tokenizer, or an end of turn that is no single token.
    """

    def __init__(self, processor: Any, family: ModelFamily, *, max_length: int) -> None:
        self._processor = processor
        self._family = family
        self._max_length = max_length
        self._image_features: ImageFeatures | None = None
        self._tokenizer = processor.tokenizer
        self._templated, self._chat_template = _with_template(processor, family)
        _check_tokenizer(self._tokenizer, family.end_of_turn)
        special_tokens = _special_tokens(self._tokenizer, family)
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
        # Rare characters may truly become the unknown token; every other special id in a user's text is a break-in.
        self._special_ids = np.array(sorted(set(special_tokens.values()) - {self._tokenizer.unk_token_id}))
        self._prefix_ids = _prefix_ids(self._tokenizer)

    def with_image_features(self, features: ImageFeatures) -> Self:
        """The same encoder, that takes image inputs from `features` and opens no image."""
        other = copy.copy(self)
        other._image_features = features
        return other

    @property
    def family(self) -> ModelFamily:
        """The model's family."""
        return self._family

    @property
    def processor(self) -> Any:
        """The transformers processor."""
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self._tokenizer

    @property
    def end_token_ids(self) -> list[int]:
        """The ids that end an answer when generating: the family's end of turn, and the tokenizer's own end."""
        ids = (self._tokenizer.convert_tokens_to_ids(self._family.end_of_turn), self._tokenizer.eos_token_id)
        return list(dict.fromkeys(int(token_id) for token_id in ids if token_id is not None))

    @property
    def image_layout(self) -> ImageLayout:
        """How the samples' image inputs become a batch."""
        return self._family.image_layout

    @property
    def pad_token_id(self) -> int:
        """The id that fills up batches; the end token's where the tokenizer has none of its own."""
        pad, end = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        return int(pad if pad is not None else end)

    def encode(self, sample: Sample) -> EncodedSample:
        """`sample` with its images decoded, labels on the answers and their end tokens. Raises SampleProblem."""
        return self._encode(sample.sample_id, sample.messages, supervise=True)

    def encode_prompt(self, messages: Sequence[Message]) -> EncodedSample:
        """`messages` up to and with the header that asks for the next answer; all labels are IGNORE_INDEX.

        Raises SampleProblem.
        """
        return self._encode("prompt", messages, supervise=False)

    def measure(self, sample: Sample) -> TextMeasure:
        """How long the text of `sample` is and what would be cut off it. Raises SampleProblem as `encode` would."""
        placeholders = [self._family.image_placeholder] * len(sample.images)
        text = self._encode_text(sample.messages, placeholders, supervise=True)
        return TextMeasure(
            num_text_tokens=int((text.cut.keep & (text.kinds != Kind.IMAGE)).sum()),
            num_supervised_tokens=int(text.cut.supervised.sum()),
            num_cut_prompt_tokens=text.cut.num_prompt_tokens,
            num_cut_answer_tokens=text.cut.num_answer_tokens,
            num_escaped=text.num_escaped,
        )

    def _encode(self, sample_id: str, messages: Sequence[Message], *, supervise: bool) -> EncodedSample:
        images = list(images_of(messages))
        image_inputs: dict[str, Any] = {}
        replacements: Sequence[str] = []
        if images:
            image_inputs, replacements = self._image_inputs(images)
            image_inputs |= self._family.prompt_inputs(self._processor, _question(messages), len(images))
        text = self._encode_text(messages, replacements, supervise=supervise)
        input_ids = torch.from_numpy(text.ids[text.cut.keep])
        is_answer = torch.from_numpy(text.cut.supervised[text.cut.keep])
        return EncodedSample(
            input_ids=input_ids,
            labels=torch.where(is_answer, input_ids, IGNORE_INDEX),
            image_inputs=image_inputs,
            sample_id=sample_id,
            num_images=len(images),
            num_cut_prompt_tokens=text.cut.num_prompt_tokens,
            num_cut_answer_tokens=text.cut.num_answer_tokens,
            token_inputs=self._family.token_inputs(self._processor, input_ids, is_answer, image_inputs),
        )

    def _image_inputs(self, parts: Sequence[ImagePart]) -> tuple[dict[str, Any], Sequence[str]]:
        """The image inputs of one sample's images, and what each one's placeholder becomes."""
        if self._image_features is not None:
            kept, replacements = self._image_features.inputs_of(parts)
            return dict(kept), replacements
        processed = self._family.process_images(self._processor, [load_image(part) for part in parts])
        tensors = {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}
        return tensors, self._family.expand_placeholders(self._processor, processed, len(parts))

    def _encode_text(self, messages: Sequence[Message], replacements: Sequence[str], *, supervise: bool) -> _Text:
        """The text of `messages` as tokens, `replacements` standing for the images."""
        originals = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
        escaped = [self._escape(text) for text in originals]
        pieces = chat_pieces(
            messages,
            [text for text, _ in escaped],
            render=self._render,
            image_placeholder=self._family.image_placeholder,
            end_of_turn=self._family.end_of_turn,
            add_generation_prompt=not supervise,
        )
        remaining = iter(replacements)
        pieces = [Piece(Kind.IMAGE, next(remaining)) if piece.kind == Kind.IMAGE else piece for piece in pieces]
        ids, kinds, answers = self._tokenize(pieces)
        if not supervise:  # earlier answers of a conversation are part of the prompt
            kinds[kinds == Kind.ANSWER] = Kind.PROMPT
            kinds[kinds == Kind.END] = Kind.MARKUP
        cut = cut_to_length(kinds, answers, self._max_length)
        if supervise and not cut.supervised[1:].any():  # the first token has nothing before it to be predicted from
            raise SampleProblem(ProblemCode.NO_SUPERVISED_TOKEN, "no token of an answer is left to learn from")
        return _Text(ids, kinds, cut, sum(count for _, count in escaped))

    def _tokenize(self, pieces: Sequence[Piece]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Ids, kinds and answer numbers, int64 [tokens] each, from one call of the tokenizer on the whole text."""
        text = "".join(piece.text for piece in pieces)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        kinds, answers = token_kinds(offsets, pieces)
        self._refuse_special_text(ids, kinds)
        bos = self._tokenizer.bos_token
        if not (bos and bos in text):  # else the template has written it: no user's text can
            num_prefix = len(self._prefix_ids)
            ids = np.concatenate([self._prefix_ids, ids])
            kinds = np.concatenate([np.full(num_prefix, int(Kind.MARKUP)), kinds])
            answers = np.concatenate([np.full(num_prefix, -1), answers])
        return ids, kinds, answers

    def _refuse_special_text(self, ids: NDArray[np.int64], kinds: NDArray[np.int64]) -> None:
        """Refuse a text in which a special token came about in spite of escaping, by joining two texts or by
        the tokenizer's normalising of letters.
        """
        is_text = (kinds == Kind.PROMPT) | (kinds == Kind.ANSWER)
        found = ids[is_text & np.isin(ids, self._special_ids)]
        if len(found):
            token = self._tokenizer.convert_ids_to_tokens(int(found[0]))
            raise SampleProblem(
                ProblemCode.SPECIAL_TOKEN, f"the texts together spell the special token {token}, which can't be escaped"
            )

    def _escape(self, text: str) -> tuple[str, int]:
        """`text` with each special token that it spells broken by a blank, and how many there were."""
        num_escaped = 0
        while True:  # breaking one up may complete another around it
            text, num_found = self._special_pattern.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            if not num_found:
                return text, num_escaped
            num_escaped += num_found

    def _render(self, conversation: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            rendered: str = self._templated.apply_chat_template(
                conversation,
                chat_template=self._chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._family.template_arguments,
            )
        except TemplateError as error:
            raise SampleProblem(
                ProblemCode.TEMPLATE_MISMATCH, f"the model's chat template refuses this conversation: {error}"
            ) from error
        return rendered


def _question(messages: Sequence[Message]) -> str:
    """The users' words before the first answer."""
    before = itertools.takewhile(lambda message: message.role != "assistant", messages)
    return "\n".join(message.text for message in before if message.role == "user")


def _with_template(processor: Any, family: ModelFamily) -> tuple[Any, str | None]:
    """The processor, or its tokenizer: whichever has the chat template; else the tokenizer, and the family's template.

    Raises UnsupportedModel.
    """
    for owner in (processor, processor.tokenizer):
        if getattr(owner, "chat_template", None):
            return owner, None
    if family.chat_template is not None:
        return processor.tokenizer, family.chat_template
    raise UnsupportedModel(
        "the model's processor has no chat template",
        expected="a chat template in chat_template.jinja, processor_config.json or tokenizer_config.json",
        next_step="use a chat (instruct) version of the model, or add the template to its folder",
    )


def _check_tokenizer(tokenizer: Any, end_of_turn: str) -> None:
    """Raise UnsupportedModel unless labels can be placed by character offsets and end in one token."""
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets",
            expected="a fast tokenizer (tokenizer.json)",
            next_step="convert the model's tokenizer to tokenizer.json with transformers",
        )
    ids = tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] not in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        raise UnsupportedModel(
            f"the tokenizer writes the end of a turn, {end_of_turn}, as tokens {ids}",
            expected="one special token of its own",
            next_step="use the tokenizer that belongs to the model",
        )


def _special_tokens(tokenizer: Any, family: ModelFamily) -> dict[str, int]:
    """Text and id of every token that must never come out of a user's text."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = (*tokenizer.all_special_tokens, *family.reserved_texts, family.image_placeholder, family.end_of_turn)
    added.update((text, tokenizer.convert_tokens_to_ids(text)) for text in named)
    return {text: token_id for text, token_id in added.items() if len(text) > 1 and token_id is not None}


def _prefix_ids(tokenizer: Any) -> NDArray[np.int64]:
    """The ids that the tokenizer puts in front of a text by itself (mostly one start token, or none)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    start = next(index for index in range(len(dressed)) if dressed[index : index + len(bare)] == bare)
    return np.array(dressed[:start], dtype=np.int64)
