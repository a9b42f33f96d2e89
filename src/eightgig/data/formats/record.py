"""What all record shapes share: their contract, where their images lie, and the rules every conversation keeps."""

from __future__ import annotations

import base64
import binascii
import math
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart, Message, Role, TextPart

IMAGE_MARKER = "<image>"  # what LLaVA's data files write where an image stands, whatever the model's own token is

MAX_TEXT_CHARACTERS = 250_000
"""Longest text of a sample, all turns together. Some 60,000 tokens, more than any model here learns from at one time; a
tokenizer takes some hundred bytes a token while it works, in each process that decodes samples."""

MAX_PATH_CHARACTERS = 4096  # PATH_MAX of Linux; no system takes more
_NETWORK = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # a URL's scheme (RFC 3986) and the host behind it
_WINDOWS = re.compile(r"[a-z]:[\\/]|\\\\", re.IGNORECASE)  # a drive's letter, or a share of the network

ROLE_NAMES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class RecordFormat:
    """One shape of a data record.

    Attributes:
        name: the shape's name in messages.
        keys: the keys that make the shape, as shown to a user whose file fits none.
        matches: whether a record has this shape, by its keys alone.
        parse: the conversation of a record; relative image paths lie below the given root. Raises SampleProblem.
    """

    name: str
    keys: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any], Path], tuple[Message, ...]]


def image_part(reference: Any, root: Path) -> ImagePart:
    """The image that `reference` (a path, or a `data:` URL) names; relative paths lie below `root`."""
    if isinstance(reference, Mapping) and "path" in reference:  # an image as Hugging Face data sets write it
        reference = reference["path"]
    if not isinstance(reference, str) or not reference.strip():
        raise SampleProblem(ProblemCode.BAD_FIELD, f"an image must be a path, not {shown(reference)}")
    reference = reference.strip()
    if reference.startswith("data:"):
        return ImagePart(data=_decode_data_url(reference))
    if reference.startswith("file://"):
        reference = unquote(urlsplit(reference).path)
    if _NETWORK.match(reference):
        raise SampleProblem(
            ProblemCode.REMOTE_IMAGE, f"image {reference[:200]} is on the network: download it first and give its path"
        )
    if "\0" in reference or len(reference) > MAX_PATH_CHARACTERS:
        raise SampleProblem(ProblemCode.BAD_FIELD, f"an image's path can't be {shown(reference)}")
    if os.name != "nt" and _WINDOWS.match(reference):
        raise SampleProblem(
            ProblemCode.BAD_FIELD, f"{shown(reference)} is a path of Windows: give it as this system has it, with /"
        )
    return ImagePart(path=_below(root, reference))


def image_references(value: Any) -> list[Any]:
    """The entries of an `image` or `images` field: none, one or a list of them."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def marked_parts(text: str, images: Sequence[ImagePart]) -> tuple[list[TextPart | ImagePart], int]:
    """`text` with each `<image>` replaced by the next of `images`, and the number of markers met."""
    parts: list[TextPart | ImagePart] = []
    pieces = text.split(IMAGE_MARKER)
    for index, piece in enumerate(pieces):
        if index > 0 and index <= len(images):
            parts.append(images[index - 1])
        parts.append(TextPart(piece))
    return parts, len(pieces) - 1


def check_num_markers(num_markers: int, num_images: int) -> None:
    """Raise SampleProblem unless the placeholders of a sample match its images one to one."""
    if num_markers != num_images:
        raise SampleProblem(
            ProblemCode.PLACEHOLDER_MISMATCH, f"{num_markers} image placeholders in the text, but {num_images} images"
        )


def role_of(name: Any) -> Role:
    """The role that `name` stands for."""
    if not isinstance(name, str) or name not in ROLE_NAMES:
        known = ", ".join(ROLE_NAMES)
        raise SampleProblem(ProblemCode.UNKNOWN_ROLE, f"unknown role {shown(name)}; known are {known}")
    return ROLE_NAMES[name]


def text_of(value: Any, field: str) -> str:
    """The text of a field; numbers are written out, nothing at all is an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    # Not NaN, which Python's JSON lets through: exporters write it where a text is missing.
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and is_finite:
        return str(value)
    raise SampleProblem(ProblemCode.BAD_FIELD, f"{field} must be text, not {shown(value)}")


def finished_messages(turns: Iterable[tuple[Role, Sequence[TextPart | ImagePart]]]) -> tuple[Message, ...]:
    """The conversation, its texts stripped, once it keeps the rules that every shape shares. Raises SampleProblem."""
    messages: list[Message] = []
    for role, raw_parts in turns:
        parts = [TextPart(part.text.strip()) if isinstance(part, TextPart) else part for part in raw_parts]
        parts = [part for part in parts if isinstance(part, ImagePart) or part.text]
        if role == "assistant":
            parts = [_answer(parts)]
        elif not parts and role == "system":
            continue  # exporters write an empty system text where there is none
        elif not parts:
            raise SampleProblem(ProblemCode.EMPTY_MESSAGE, "a user's turn holds neither text nor image")
        messages.append(Message(role, tuple(parts)))
    num_characters = sum(len(message.text) for message in messages)
    if num_characters > MAX_TEXT_CHARACTERS:
        reason = f"the texts have {num_characters:,} characters, more than {MAX_TEXT_CHARACTERS:,}"
        raise SampleProblem(ProblemCode.TOO_LARGE, reason)
    if not any(message.role == "assistant" for message in messages):
        raise SampleProblem(ProblemCode.NO_SUPERVISED_TOKEN, "no assistant's turn: there is nothing to learn")
    return tuple(messages)


def shown(value: Any) -> str:
    """`value` as it is quoted in a reason, at most 80 characters of it."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _answer(parts: Sequence[TextPart | ImagePart]) -> TextPart:
    """The one text of an assistant's turn: a single text makes a single supervised span."""
    if any(isinstance(part, ImagePart) for part in parts):
        raise SampleProblem(ProblemCode.IMAGE_IN_ANSWER, "an assistant's turn holds an image, which can't be learnt")
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if not text:
        raise SampleProblem(ProblemCode.EMPTY_ANSWER, "an assistant's turn is empty")
    return TextPart(text)


def _below(root: Path, reference: str) -> Path:
    """`reference`, taken from `root`; a relative one that climbs out of `root` is refused."""
    if os.path.isabs(reference):
        return Path(reference)
    base = os.path.abspath(root)
    joined = os.path.normpath(os.path.join(base, reference))  # by name only: linked folders are the user's own choice
    if os.path.commonpath([base, joined]) != base:
        raise SampleProblem(
            ProblemCode.PATH_OUTSIDE_ROOT,
            f"image {reference[:200]} leaves {root}: set the image root to a folder above it, or give an absolute path",
        )
    return Path(joined)


def _decode_data_url(url: str) -> bytes:
    """The bytes of a base64 `data:` URL."""
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise SampleProblem(ProblemCode.BAD_BASE64, f"not a base64 data URL: {shown(url)}")
    return decode_base64(body)


def decode_base64(text: Any) -> bytes:
    """The bytes that `text` stands for in base64; line breaks in it are allowed."""
    if not isinstance(text, str):
        raise SampleProblem(ProblemCode.BAD_BASE64, f"base64 must be text, not {shown(text)}")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside ASCII
        raise SampleProblem(ProblemCode.BAD_BASE64, f"the image's base64 can't be decoded: {error}") from error
