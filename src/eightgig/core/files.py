"""Writing files and folders so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eightgig.core.errors import DoesNotFit, EnvironmentProblem


def fsync_path(path: Path) -> None:
    """Ask the system to put `path` (a file or a folder) on the disk before going on."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders for syncing; the rename itself is journaled there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission while writing `path` into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = shutil.disk_usage(existing_parent(path)).free
            raise DoesNotFit(
                f"the disk is full: writing {path} failed with {free_bytes:,} bytes free",
                expected="enough free disk space for the file",
                next_step="free some space or choose another folder with --output-dir, then run again",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise EnvironmentProblem(
                f"{path} can't be written: {error.strerror}",
                expected="a folder that you may write to",
                next_step="choose another folder with --output-dir, or change the folder's permissions",
            ) from error
        raise


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _partial_name(path: Path) -> Path:
    """A name beside `path` that nothing has; not through `tempfile`, whose files only their owner may read."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`: the old content or the new one is there, never half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`: the old content or the new one is there, never half of it."""
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _partial_name(path)
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Every file is synced to disk before the one rename that makes the folder appear.
    """
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _partial_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for item in sorted(temporary.rglob("*")):
                fsync_path(item)
            fsync_path(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_path(path.parent)
