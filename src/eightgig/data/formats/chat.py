"""Chat messages: `messages`, their image parts as OpenAI or as Hugging Face writes them, or an `images` column.

Sources: OpenAI's "Images and vision" guide (`image_url` parts, `input_image` parts), transformers' "Multimodal chat
templates" page (`image` parts with `image`, `path`, `url` or `base64`), TRL's "Dataset formats" page (`images` column).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.data.formats.record import (
    RecordFormat,
    check_num_markers,
    decode_base64,
    finished_messages,
    image_part,
    image_references,
    marked_parts,
    role_of,
    shown,
    text_of,
)
from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart, Message, Role, TextPart

_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
_REFERENCE_KEYS = ("image_url", "image", "path", "url")


def _matches(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("messages"), list)


def _parse(record: Mapping[str, Any], root: Path) -> tuple[Message, ...]:
    references = image_references(record.get("images", record.get("image")))
    column = [image_part(reference, root) for reference in references]
    num_used = 0
    turns: list[tuple[Role, Sequence[TextPart | ImagePart]]] = []
    for message in record["messages"]:
        if not isinstance(message, Mapping):
            raise SampleProblem(ProblemCode.BAD_FIELD, f"a message must be an object, not {shown(message)}")
        role = role_of(message.get("role"))
        content = message.get("content")
        if isinstance(content, list):
            parts, num_taken = _listed_parts(content, root, column[num_used:])
        elif column and role != "assistant":
            parts, num_taken = marked_parts(text_of(content, "content"), column[num_used:])
        else:  # without an images column there is nothing a marker could stand for: it is plain text
            parts, num_taken = [TextPart(text_of(content, "content"))], 0
        num_used += num_taken
        turns.append((role, parts))
    check_num_markers(num_used, len(column))
    return finished_messages(turns)


def _listed_parts(
    content: Sequence[Any], root: Path, column: Sequence[ImagePart]
) -> tuple[list[TextPart | ImagePart], int]:
    """The parts of a content list, and how many of its images were to come from the `images` column."""
    parts: list[TextPart | ImagePart] = []
    num_taken = 0
    for part in content:
        if isinstance(part, str):
            parts.append(TextPart(part))
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_TYPES:
            parts.append(TextPart(text_of(part.get("text"), "a text part")))
        elif kind in _IMAGE_TYPES:
            image = _own_image(part, root)
            if image is None:
                image = column[num_taken] if num_taken < len(column) else None
                num_taken += 1
            if image is not None:
                parts.append(image)
        else:
            raise SampleProblem(ProblemCode.BAD_FIELD, f"a content part is neither text nor image: {shown(part)}")
    return parts, num_taken


def _own_image(part: Mapping[str, Any], root: Path) -> ImagePart | None:
    """The image that a part names itself, None when it leaves that to the `images` column."""
    if part.get("base64") is not None:
        return ImagePart(data=decode_base64(part["base64"]))
    for key in _REFERENCE_KEYS:
        reference = part.get(key)
        if key == "image_url" and isinstance(reference, Mapping):
            reference = reference.get("url")
        if reference is not None:
            return image_part(reference, root)
    return None


FORMAT = RecordFormat(
    name="chat messages", keys='"messages" (with "role" and "content")', matches=_matches, parse=_parse
)
