"""Reading a configuration file, with a message for each way in which it can be no configuration file at all."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from eightgig.config import textformat
from eightgig.core.errors import ConfigError, Problem

SUFFIXES = (".yaml", ".yml", ".json")


def read_file(path: Path) -> dict[Any, Any]:
    """The settings in the file `path`, nested, not yet checked. Raises ConfigError where it holds no settings."""
    suffix = known_suffix(path)
    text = _read_text(path)
    try:
        values = textformat.parse(text, suffix)
    except textformat.BrokenText as error:
        raise ConfigError(
            [error.problem], source=f"file {path}", next_step=f"correct the syntax of {path}, then run again"
        ) from error
    if values is None:
        raise _error(path, "empty", "settings, such as `preset: ultra_low_memory`")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise _error(path, kind, "groups of settings, such as `data:` with `data_path: train.jsonl` inside")
    return values


def known_suffix(path: Path) -> str:
    """The suffix of `path` in lower case. Raises ConfigError where it is no configuration file's."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise _error(path, path.name, f"a name that ends in {', '.join(SUFFIXES)}")
    return suffix


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors put a byte-order mark in front
    except FileNotFoundError as error:
        raise _error(path, path.name, f"a file that exists{_nearest_file(path)}") from error
    except UnicodeDecodeError as error:
        raise _error(path, f"byte {error.start} is no UTF-8", "text in UTF-8") from error
    except OSError as error:
        raise _error(path, path.name, f"a file that can be read ({error.strerror})") from error


def _nearest_file(path: Path) -> str:
    """A hint at the file beside `path` with the most similar name; empty where there is none."""
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    beside = [item.name for item in path.parent.iterdir() if item.suffix.lower() in SUFFIXES]
    nearest = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else ""


def _error(path: Path, found: str, allowed: str) -> ConfigError:
    problem = Problem("file", found, allowed)
    return ConfigError([problem], source=f"file {path}", next_step=f"correct {path}, or name another file or a preset")
