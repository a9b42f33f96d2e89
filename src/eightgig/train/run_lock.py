"""One run folder, one writer: a lock of the operating system, which ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from eightgig.core.errors import EnvironmentProblem
from eightgig.core.files import explained_write_errors

LOCK = "run.lock"


def is_held(folder: Path) -> bool:
    """Whether a process writes to the run in `folder`; the file alone, which a killed one leaves, says nothing."""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes to the run in `folder`, which must exist.

    Data workers don't inherit the lock: filelock closes its file in a forked child. A folder in which nothing but the
    lock is left at the end goes with it.

    Raises:
        EnvironmentProblem: another process is.
    """
    lock = FileLock(folder / LOCK)
    try:
        with explained_write_errors(folder):
            lock.acquire(blocking=False)
    except Timeout as error:
        raise held_by_another(folder) from error
    try:
        yield
    finally:
        # A folder that can't be written to any more keeps the file; what ended the run is to be told, not that.
        with contextlib.suppress(OSError):
            remove_lock_file(folder)
        lock.release()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def held_by_another(folder: Path) -> EnvironmentProblem:
    """The error of a run in `folder` that another process writes to."""
    return EnvironmentProblem(
        f"another process is training in {folder}",
        expected="one process at a time that writes to a run",
        next_step="wait until it has ended, or stop it with Ctrl-C (or `kill PID`), which saves first; else choose "
        "another --run-folder",
    )


def remove_lock_file(folder: Path) -> None:
    """Delete the lock's file, if there is one: filelock takes no lock on a file that is gone by then."""
    if os.name != "nt":  # Windows deletes no open file; there filelock does so itself
        (folder / LOCK).unlink(missing_ok=True)
