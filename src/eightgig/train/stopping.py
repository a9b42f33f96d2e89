"""Stopping a run from outside: the step in hand is finished and saved; a second signal stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping: the step in hand is finished and saved; the same again stops at once"


class RunStopped(KeyboardInterrupt):
    """A run was stopped by a signal; caught as Ctrl-C is.

    Attributes:
        signal_number: of the signal.
    """

    def __init__(self, signal_number: int, when: str) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {when}")


class StopRequest:
    """Whether a run was asked to stop. Outside of `finishing_steps` there is nothing to save: it stops at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` shows the user a line."""
        self._tell = tell
        self._signal_number: int | None = None
        self._finishes_step = False

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked."""
        return self._signal_number is not None

    def stopped(self, when: str) -> RunStopped:
        """The exception that ends the run; a process that was not asked itself stops for one that was."""
        return RunStopped(self._signal_number or signal.SIGTERM, when)

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        """Take a signal: the handler."""
        is_first = self._signal_number is None
        self._signal_number = self._signal_number or signal_number
        if not is_first or not self._finishes_step:
            raise RunStopped(signal_number, "at once")
        # RuntimeError: the signal met a write to the same stream, which can't be entered twice.
        with contextlib.suppress(RuntimeError):
            self._tell(STOPPING)

    @contextlib.contextmanager
    def finishing_steps(self) -> Iterator[None]:
        """Inside, the first signal is only noted, for whoever asks `is_asked`."""
        with self._set(finishes_step=True):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, which lies in `finishing_steps`, even the first signal stops: nothing is lost by it.

        Raises:
            RunStopped: it came before.
        """
        if self.is_asked:
            raise self.stopped("at once")
        with self._set(finishes_step=False):
            yield

    @contextlib.contextmanager
    def _set(self, *, finishes_step: bool) -> Iterator[None]:
        before = self._finishes_step
        self._finishes_step = finishes_step
        try:
            yield
        finally:
            self._finishes_step = before


@contextlib.contextmanager
def heeding_signals(tell: Callable[[str], None]) -> Iterator[StopRequest]:
    """A request that Ctrl-C and SIGTERM make, while the block runs.

    Only what would end the process is taken: a signal that is ignored (as SIGINT by what a shell started in the
    background) stays so, and a handler of the caller's own stays too. Off the main thread Python takes no signals.
    """
    request = StopRequest(tell)
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    before[number] = signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
