"""The shapes a data record may have, and how a file's shape is told. A new shape is one module and one row here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.data.formats import chat, flat, llava
from eightgig.data.formats.record import RecordFormat

FORMATS: tuple[RecordFormat, ...] = (llava.FORMAT, chat.FORMAT, flat.FORMAT)


def detect_format(record: Mapping[str, Any], shapes: Sequence[RecordFormat] = FORMATS) -> RecordFormat | None:
    """The first of `shapes` that `record` has, None when it has none of them."""
    return next((shape for shape in shapes if shape.matches(record)), None)
