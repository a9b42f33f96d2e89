"""The run as plain lines without colour or control characters, for logs and pipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from eightgig.cli import lines
from eightgig.cli.receipt import receipt_rows_lines
from eightgig.cli.session import Session

if TYPE_CHECKING:
    from eightgig.train.events import RunOutcome, RunStart

STEP_INTERVAL_S = 5.0  # between two lines of steps, so that fast steps don't flood a log


class PlainListener:
    """Writes a line for each event; of the steps the first, the last and one every STEP_INTERVAL_S."""

    def __init__(self, session: Session, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._session = session
        self._stream = stream
        self._clock = clock
        self._last_step_line_s: float | None = None

    def on_message(self, text: str) -> None:
        """Write the message."""
        self._write(text)

    def on_start(self, start: RunStart) -> None:
        """Write what is about to run, with the receipt."""
        self._session.run_folder = start.run_folder
        for line in [*lines.start_lines(start), "", *receipt_rows_lines(start.receipt_rows), ""]:
            self._write(line)

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Write the step, if its turn has come."""
        now_s = self._clock()
        is_last = record["step"] == record["steps_planned"]
        if self._last_step_line_s is None or is_last or now_s - self._last_step_line_s >= STEP_INTERVAL_S:
            self._last_step_line_s = now_s
            what = f"{lines.learning_text(record)} · {lines.speed_text(record)} · {lines.eta_text(record)}"
            self._write(f"step {record['step']}/{record['steps_planned']} · {what}")

    def on_validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """Write the result with the first answers."""
        for line in [lines.validation_text(record), *lines.answer_lines(generations)]:
            self._write(line)

    def on_checkpoint(self, path: Path, reason: str) -> None:
        """Write where the checkpoint is."""
        self._write(f"checkpoint {path} ({reason})")

    def on_finish(self, outcome: RunOutcome) -> None:
        """Nothing to draw: the verb prints the outcome on stdout."""

    def close(self) -> None:
        """Make sure that every line is out."""
        self._stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
