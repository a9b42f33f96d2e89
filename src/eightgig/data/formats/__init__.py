"""The shapes a data record may have, and how a file's shape is told. A new shape is one module and one row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eightgig.data.formats import chat, flat, llava
from eightgig.data.formats.record import RecordFormat

FORMATS: tuple[RecordFormat, ...] = (llava.FORMAT, chat.FORMAT, flat.FORMAT)


def detect_format(record: Mapping[str, Any]) -> RecordFormat | None:
    """The shape that `record` has, None when it has no known one."""
    return next((shape for shape in FORMATS if shape.matches(record)), None)
