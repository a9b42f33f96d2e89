"""A sample as it was read, before any pixel is decoded or any token counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class SourceRef:
    """Where a sample stands.

    Attributes:
        file: the data file, or the image of a captioned folder.
        line: 1-based line of a JSONL file, last line of a CSV row, 1-based position in a JSON list; 0 for an image of a
            folder.
    """

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of a message's text, stripped of blanks at both ends."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image in a message: a file (`path`), or the file's content when the record carried it as base64 (`data`)."""

    path: Path | None = None
    data: bytes | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"an embedded image of {len(self.data or b'')} bytes"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]

    @property
    def text(self) -> str:
        """The message's texts, one under the other."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation with its images. Ids need not be unique: `source` tells samples apart."""

    sample_id: str
    messages: tuple[Message, ...]
    source: SourceRef

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """All images, in the order of the messages."""
        return tuple(images_of(self.messages))

    @property
    def image_names(self) -> tuple[str, ...]:
        """The images' paths; an embedded image is described."""
        return tuple(map(str, self.images))


def images_of(messages: Sequence[Message]) -> Iterator[ImagePart]:
    """The images of `messages`, in order."""
    for message in messages:
        for part in message.parts:
            if isinstance(part, ImagePart):
                yield part
