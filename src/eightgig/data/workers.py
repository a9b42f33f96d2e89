"""Waiting for the worker processes of a torch DataLoader, and noticing when they die or hang."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

POLL_S = 1.0
"""How often dead workers are looked for while a batch is waited for; the DataLoader's own `timeout`."""

# How torch's DataLoader words it: it has no errors of their own for these.
_ENDED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")
_NOTHING_YET = re.compile(r"DataLoader timed out after")
_RAISED_INSIDE = "in DataLoader worker process"  # an error of the worker's own code, sent here

# Tensors are fetched from the worker that made them. One that has just died and does not count as dead yet shows so;
# behind pinned memory with "Caught EOFError in pin memory thread", so not every text of that form is the worker's.
_LINE_BROKEN = (EOFError, ConnectionError, FileNotFoundError)

Batch = TypeVar("Batch")


class WorkersFailed(Exception):
    """A worker has died, or has given nothing for too long; the DataLoader can't be used any more."""


def next_of(batches: Iterator[Batch], timeout_s: float | None) -> Batch:
    """The next of a DataLoader's `batches`, waited for `timeout_s` at most, without end where that is None.

    The DataLoader is made with `timeout=POLL_S`: it looks for dead workers whenever that has passed, and may be asked
    again afterwards.

    Raises:
        WorkersFailed: a worker has died, or the time is over.
    """
    started_s = time.monotonic()
    while True:
        try:
            return next(batches)
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else ""
            if _ENDED.search(text):
                raise WorkersFailed(f"a data worker was ended by the system: {text}") from error
            if not _NOTHING_YET.search(text):
                raise
        except _LINE_BROKEN as error:
            if _RAISED_INSIDE in str(error):
                raise
            raise WorkersFailed("a data worker was ended by the system while it handed over a batch") from error
        if timeout_s is not None and time.monotonic() - started_s > timeout_s:
            raise WorkersFailed(f"a data worker has given nothing for {timeout_s:g} s (data.worker_timeout_s)")


@contextlib.contextmanager
def quiet_when_a_worker_ends() -> Iterator[None]:
    """Start a DataLoader's workers inside: it does not get to raise errors in whatever code runs when one of them dies.

    torch has the system's signal do so, in the middle of a training step as well, where no loader can answer it. Dead
    workers are found all the same, where a batch is waited for.
    """
    can_tell = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if can_tell else None
    try:
        yield
    finally:
        if before is not None:  # else it is not for Python to put back
            signal.signal(signal.SIGCHLD, before)
