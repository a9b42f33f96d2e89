"""Where the answers lie in the text that a chat template makes of a conversation.

The template is rendered once with a marker in place of every text, which gives the exact place of each text whatever
the template writes around it; the markers' texts put back must give the template's own rendering, or the sample is
refused. Nothing is searched for by its words, so a text that looks like a role header changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import Message, TextPart

Render = Callable[[list[dict[str, Any]], bool], str]
"""The chat template: conversation, and whether to add the header that asks for an answer, to text."""

# Private-use characters: no template tests for them, trims them or writes them itself.
_MARKER = re.compile("\ue000(\\d+)\ue001")


class Kind(IntEnum):
    """What a piece of the rendered text, or a token of it, is."""

    MARKUP = 0  # the template's own
    PROMPT = 1  # a user's or the system's text
    ANSWER = 2  # an assistant's text: supervised
    END = 3  # the end of an assistant's turn: supervised
    IMAGE = 4  # stands for one image


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the rendered text. `answer` numbers the assistant's turn of an ANSWER or END piece, else -1."""

    kind: Kind
    text: str
    answer: int = -1


def chat_pieces(
    messages: Sequence[Message],
    texts: Sequence[str],
    *,
    render: Render,
    image_placeholder: str,
    end_of_turn: str,
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """The rendered conversation in pieces, end to end; `texts` stand in for the texts of `messages`, in order.

    Each assistant's turn is followed by one END piece: what the template writes there if it begins with
    `end_of_turn`, else `end_of_turn` itself, added. A blank that the template writes between the header that asks for
    an answer and the answer belongs to the answer, since the model will have to write it.

    Raises:
        SampleProblem: the template leaves out or alters a text, or writes other than one placeholder an image.
    """
    markers = [f"\ue000{index}\ue001" for index in range(len(texts))]
    marked = render(_conversation(messages, markers), add_generation_prompt)
    markup, order = _MARKER.split(marked)[::2], [int(index) for index in _MARKER.split(marked)[1::2]]
    if order != list(range(len(texts))):
        raise SampleProblem(
            ProblemCode.TEMPLATE_MISMATCH, "the model's chat template leaves out, repeats or reorders a message's text"
        )
    substituted = "".join(part for pair in zip(markup, [*texts, ""], strict=True) for part in pair)
    if substituted != render(_conversation(messages, texts), add_generation_prompt):
        raise SampleProblem(
            ProblemCode.TEMPLATE_MISMATCH, "the model's chat template alters a message's text, so no answer is certain"
        )
    num_placeholders, num_images = sum(part.count(image_placeholder) for part in markup), _num_images(messages)
    if num_placeholders != num_images:
        raise SampleProblem(
            ProblemCode.PLACEHOLDER_MISMATCH,
            f"the chat template writes {num_placeholders} image placeholders for {num_images} images",
        )
    leads = _answer_leads(messages, markers, marked, render)
    pieces: list[Piece] = []
    for index, text in enumerate(texts):
        lead = leads.get(index)
        if lead is None:
            pieces += [*_markup_pieces(markup[index], image_placeholder), Piece(Kind.PROMPT, text)]
            continue
        answer = list(leads).index(index)
        before, blank = markup[index][: len(markup[index]) - lead], markup[index][len(markup[index]) - lead :]
        end, markup[index + 1] = _split_end(markup[index + 1], end_of_turn)
        pieces += _markup_pieces(before, image_placeholder)
        pieces += [Piece(Kind.ANSWER, blank + text, answer), Piece(Kind.END, end, answer)]
    return [piece for piece in [*pieces, *_markup_pieces(markup[-1], image_placeholder)] if piece.text]


def token_kinds(offsets: NDArray[np.int64], pieces: Sequence[Piece]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kind and answer number of each token, int64 [tokens] each, from character `offsets`, int64 [tokens, 2].

    A token that reaches over a border is supervised if either side is, and counts as the prompt's only if both are.
    A token of no width (byte-level tokenizers give some) belongs to the character that follows.
    """
    lengths = [len(piece.text) for piece in pieces]
    kind_of_char = np.repeat([int(piece.kind) for piece in pieces], lengths)
    answer_of_char = np.repeat([piece.answer for piece in pieces], lengths)
    last_char = len(kind_of_char) - 1
    first = np.minimum(offsets[:, 0], last_char)
    last = np.clip(offsets[:, 1] - 1, first, last_char)
    first_kind, last_kind = kind_of_char[first], kind_of_char[last]
    kinds = np.where(first_kind == last_kind, first_kind, int(Kind.MARKUP))
    for supervised in (Kind.ANSWER, Kind.END):
        kinds[(first_kind == supervised) | (last_kind == supervised)] = supervised
    return kinds, np.maximum(answer_of_char[first], answer_of_char[last])


def _conversation(messages: Sequence[Message], texts: Sequence[str]) -> list[dict[str, Any]]:
    """`messages` as chat templates take them, with `texts` in place of their own."""
    remaining = iter(texts)
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": next(remaining)} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in messages
    ]


def _num_images(messages: Sequence[Message]) -> int:
    return sum(not isinstance(part, TextPart) for message in messages for part in message.parts)


def _answer_leads(messages: Sequence[Message], markers: Sequence[str], marked: str, render: Render) -> dict[int, int]:
    """For each assistant's text, by its index among all texts: how many blanks before it the model has to write."""
    leads: dict[int, int] = {}
    num_texts = 0
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            leads[num_texts] = 0
            before = marked[: marked.index(markers[num_texts])]
            prompt = render(_conversation(messages[:turn], markers), True) if turn else before
            if before.startswith(prompt) and before[len(prompt) :].isspace():
                leads[num_texts] = len(before) - len(prompt)
        num_texts += sum(isinstance(part, TextPart) for part in message.parts)
    return leads


def _split_end(markup: str, end_of_turn: str) -> tuple[str, str]:
    """The end of an answer and the rest of the `markup` behind it."""
    match = re.match(rf"\s*{re.escape(end_of_turn)}", markup)
    return (match[0], markup[match.end() :]) if match else (end_of_turn, markup)


def _markup_pieces(markup: str, image_placeholder: str) -> list[Piece]:
    """`markup` with its image placeholders as pieces of their own."""
    pieces: list[Piece] = []
    for index, text in enumerate(markup.split(image_placeholder)):
        if index:
            pieces.append(Piece(Kind.IMAGE, image_placeholder))
        pieces.append(Piece(Kind.MARKUP, text))
    return pieces
