"""Waiting for data workers: what counts as their end, what as their own error, and what as patience."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from eightgig.data.workers import WorkersFailed, next_of


class _Raising:
    """Stands in for a DataLoader's iterator: raises each of `errors` in turn, then gives 7."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._errors:
            raise self._errors.pop(0)
        return 7


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        EOFError(),
        EOFError("Caught EOFError in pin memory thread for device 0."),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        FileNotFoundError(2, "No such file or directory"),
    ],
    ids=repr,
)
def test_a_worker_that_is_gone_is_told_however_it_shows(error: Exception) -> None:
    with pytest.raises(WorkersFailed, match="a data worker was ended by the system"):
        next_of(_Raising(error), None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
        FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."),
        ValueError("shapes differ"),
    ],
    ids=repr,
)
def test_a_workers_own_error_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        next_of(_Raising(error), None)
    assert caught.value is error


def test_time_is_given_and_comes_to_an_end() -> None:
    nothing = [RuntimeError("DataLoader timed out after 1.0 seconds") for _ in range(5)]
    assert next_of(_Raising(*nothing), None) == 7
    assert next_of(_Raising(*nothing), 60.0) == 7

    class Waiting(_Raising):
        def __next__(self) -> int:
            time.sleep(0.02)
            raise RuntimeError("DataLoader timed out after 1.0 seconds")

    with pytest.raises(WorkersFailed, match=r"has given nothing for 0\.1 s \(data\.worker_timeout_s\)"):
        next_of(Waiting(), 0.1)
