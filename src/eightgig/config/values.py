"""How the value of a setting is shown to the user, the same in errors and tables."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

_MAX_SHOWN_CHARACTERS = 80


def shown(value: Any) -> str:
    """`value` as a file would hold it: true, null, 0.0002, some text; cut after 80 characters."""
    if isinstance(value, Enum):
        text = str(value.value)
    elif isinstance(value, Path) or (isinstance(value, str) and not _needs_quotes(value)):
        text = str(value)
    elif value is None or isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, Mapping):
        items = (f"{key}: {'{…}' if isinstance(item, Mapping) else shown(item)}" for key, item in value.items())
        text = "{" + ", ".join(items) + "}"
    else:
        text = repr(value) if isinstance(value, int | float) else reprlib.repr(value)  # lists of any depth
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[: _MAX_SHOWN_CHARACTERS - 1] + "…"


def _needs_quotes(text: str) -> bool:
    """Whether bare `text` would look like nothing, or like a number, true, false or null."""
    if text.strip() != text or not text:
        return True
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
