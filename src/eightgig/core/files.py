"""Writing files and folders so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eightgig.core.errors import DoesNotFit, EightGigError, EnvironmentProblem

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)  # mkdir says "exists" of a file that stands where a folder should be
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.partial")
_CODE_OF_SAFETENSORS = re.compile(r"os error (\d+)")  # it tells the system's errors in no other way


def fsync_path(path: Path) -> None:
    """Ask the system to put `path` (a file or a folder) on the disk before going on."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders for syncing; the rename itself is journaled there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it that are missing, each one's name synced to the disk."""
    made = []
    folder = path
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(made):
        fsync_path(folder.parent)


@contextlib.contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses while `path` is written into an error that says what to do; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        explained = _explain(error, path)
        if explained is None:
            raise
        raise explained from error


def _explain(error: OSError | SafetensorError, path: Path) -> EightGigError | None:
    code = error.errno if isinstance(error, OSError) else _code_of(error)
    reason = os.strerror(code) if code is not None else ""
    if code in _FULL:
        free_bytes = shutil.disk_usage(existing_parent(path)).free
        return DoesNotFit(
            f"the disk is full: writing {path} failed with {free_bytes:,} bytes free",
            expected="enough free disk space for the file",
            next_step="free some space or choose another folder with --output-dir, then run again",
        )
    if code == errno.EFBIG:
        return DoesNotFit(
            f"{path} can't be written: {reason}",
            expected="a file system without a limit on the size of a file (FAT32 ends at 4 GB), and no `ulimit -f`",
            next_step="choose a folder on another disk with --output-dir, or raise the limit, then run again",
        )
    if code in _FORBIDDEN:
        return EnvironmentProblem(
            f"{path} can't be written: {reason}",
            expected="a folder that you may write to",
            next_step="choose another folder with --output-dir, or change the folder's permissions",
        )
    if code in _NO_FOLDER:
        blocking = existing_parent(path)
        return EnvironmentProblem(
            f"{path} can't be made: {blocking} is {'a file' if blocking.is_file() else 'in the way'}",
            expected="a folder, or a path where nothing is yet",
            next_step="choose another folder with --output-dir, or move what is in the way",
        )
    if code == errno.ENAMETOOLONG:
        return EnvironmentProblem(
            f"{path} can't be made: {reason}",
            expected="a name that the file system takes (255 bytes mostly)",
            next_step="choose a shorter name with --output-dir or --run-folder",
        )
    return None


def _code_of(error: SafetensorError) -> int | None:
    match = _CODE_OF_SAFETENSORS.search(str(error))
    return int(match[1]) if match else None


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _partial_name(path: Path) -> Path:
    """A name beside `path` that nothing has; not through `tempfile`, whose files only their owner may read."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent` for the block, deleted behind it; what a kill leaves is for `remove_leftovers`.

    Raises:
        DoesNotFit: the disk is full in the block.
        EnvironmentProblem: nothing can be written there.
    """
    folder = _partial_name(parent / name)
    with explained_write_errors(parent), contextlib.ExitStack() as finally_:
        finally_.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        yield folder


def remove_leftovers(folder: Path) -> None:
    """Delete from `folder` what writes left there that were killed. Nobody may be writing into it meanwhile."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`: the old content or the new one is there, never half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`: the old content or the new one is there, never half of it."""
    with explained_write_errors(path), contextlib.ExitStack() as on_failure:
        make_folder(path.parent)
        temporary = _partial_name(path)
        on_failure.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        on_failure.pop_all()
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Every file is synced to disk before the one rename that makes the folder appear; a folder that was there before is
    moved aside for it, put back if that rename fails, and deleted last.
    """
    with explained_write_errors(path), contextlib.ExitStack() as on_failure:
        make_folder(path.parent)
        temporary, replaced = _partial_name(path), _partial_name(path)
        temporary.mkdir()
        on_failure.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary
        for item in sorted(temporary.rglob("*")):
            fsync_path(item)
        fsync_path(temporary)
        if path.exists():
            on_failure.callback(_put_back, replaced, path)
            os.replace(path, replaced)
        os.replace(temporary, path)
        on_failure.pop_all()
        fsync_path(path.parent)
        if replaced.exists():
            shutil.rmtree(replaced)


def _put_back(replaced: Path, path: Path) -> None:
    """Undo that the folder `path` was moved to `replaced`, if it was and no other has taken its place."""
    if replaced.exists() and not path.exists():
        os.replace(replaced, path)
