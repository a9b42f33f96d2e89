"""Where the numbers of a run go: metrics.jsonl, generations.jsonl, TensorBoard and the listener."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.core.errors import DoesNotFit
from eightgig.train.events import TrainingListener
from eightgig.train.run_folder import RunFolder
from eightgig.train.tensorboard import open_writer, write_record


class Journal:
    """Logs for the main process; on every other process all calls do nothing, so that the loop need not ask.

    With `goes_on_when_full`, what a full disk does not take waits in memory until there is room again.
    """

    def __init__(
        self, folder: RunFolder, listener: TrainingListener, *, is_main: bool, goes_on_when_full: bool = False
    ) -> None:
        self._folder = folder
        self._listener = listener
        self._is_main = is_main
        self._goes_on_when_full = goes_on_when_full
        self._waiting: deque[tuple[Path, Sequence[Mapping[str, Any]]]] = deque()
        self._writer = open_writer(folder.path / "tensorboard") if is_main else None

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return self._folder

    def step(self, record: Mapping[str, Any], *, eta_s: float, steps_planned: int) -> None:
        """Log an optimizer step."""
        if self._is_main:
            self._write(record)
            self._listener.on_step({**record, "eta_s": eta_s, "steps_planned": steps_planned})

    def validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """Log a validation and its generated answers."""
        if self._is_main:
            self._append(self._folder.generations, generations)
            self._write(record)
            self._listener.on_validation(record, generations)

    def checkpoint(self, path: Path, reason: str) -> None:
        """Tell of a checkpoint."""
        if self._is_main:
            self._listener.on_checkpoint(path, reason)

    def message(self, text: str) -> None:
        """Tell the user."""
        if self._is_main:
            self._listener.on_message(text)

    def sync(self) -> None:
        """Put all that was logged on the disk.

        Raises:
            DoesNotFit: the disk is full.
        """
        self._write_waiting()
        self._folder.sync_logs()

    def recovery(self, record: Mapping[str, Any]) -> None:
        """Log levers that were switched on because memory ran out."""
        if self._is_main:
            self._write(record)

    def close(self) -> None:
        """Write out what waits, and what TensorBoard holds back.

        Raises:
            DoesNotFit: the disk is full still.
        """
        self._write_waiting()
        if self._writer is not None:
            self._writer.close()

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        had_room = not self._waiting
        self._waiting.append((path, records))
        try:
            self._write_waiting()
        except DoesNotFit as error:
            if not self._goes_on_when_full:
                raise
            if had_room:
                self.message(f"the log waits for room: {error.found}")

    def _write_waiting(self) -> None:
        while self._waiting:
            self._folder.append(*self._waiting[0])
            self._waiting.popleft()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._append(self._folder.metrics, [record])
        if self._writer is not None:
            write_record(self._writer, record)
