"""Answers kept between calls of the command, in the user's own folder for such things; losing them costs only time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from eightgig.core.errors import DoesNotFit, EnvironmentProblem
from eightgig.core.files import write_json
from eightgig.core.logging import get_logger

logger = get_logger(__name__)


def cache_folder() -> Path:
    """EightGig's folder among the caches of this user; it need not exist yet.

    XDG_CACHE_HOME counts where it is absolute, as the XDG Base Directory specification has it, on every system.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "eightgig"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "eightgig" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "eightgig"
    return Path.home() / ".cache" / "eightgig"


@dataclass(frozen=True)
class JsonCache:
    """JSON values by key, each in a file of `folder`; the `max_entries` last used ones are kept."""

    folder: Path
    max_entries: int

    def get(self, key: Mapping[str, Any]) -> Any | None:
        """The value kept under `key`; None where there is none, or none that can be read."""
        path = self._path(key)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # ValueError: no JSON, no UTF-8
            return None
        if not isinstance(kept, dict) or kept.get("key") != _plain(key):
            return None
        with contextlib.suppress(OSError):  # a folder that is read-only still answers
            os.utime(path)
        return kept.get("value")

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep `value`, whole or not at all; a folder that can't be written to is no reason to fail."""
        try:
            write_json(self._path(key), {"key": _plain(key), "value": value})
            self._forget_oldest()
        except (OSError, EnvironmentProblem, DoesNotFit) as error:
            logger.info("not kept in %s: %s", self.folder, error)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self.folder / f"{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"

    def _forget_oldest(self) -> None:
        by_age = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in by_age[self.max_entries :]:
            path.unlink(missing_ok=True)


def _plain(key: Mapping[str, Any]) -> Any:
    """`key` as it comes back from a file: tuples become lists."""
    return json.loads(json.dumps(key))
