"""Where the numbers of a run go: metrics.jsonl, generations.jsonl, TensorBoard and the listener."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.train.events import TrainingListener
from eightgig.train.run_folder import RunFolder
from eightgig.train.tensorboard import open_writer, write_record


class Journal:
    """Logs for the main process; on every other process all calls do nothing, so that the loop need not ask."""

    def __init__(self, folder: RunFolder, listener: TrainingListener, *, is_main: bool) -> None:
        self._folder = folder
        self._listener = listener
        self._is_main = is_main
        self._writer = open_writer(folder.path / "tensorboard") if is_main else None

    def step(self, record: Mapping[str, Any], *, eta_s: float, steps_planned: int) -> None:
        """Log an optimizer step."""
        if self._is_main:
            self._write(record)
            self._listener.on_step({**record, "eta_s": eta_s, "steps_planned": steps_planned})

    def validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """Log a validation and its generated answers."""
        if self._is_main:
            self._folder.append(self._folder.generations, generations)
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

    def recovery(self, record: Mapping[str, Any]) -> None:
        """Log levers that were switched on because memory ran out."""
        if self._is_main:
            self._write(record)

    def close(self) -> None:
        """Write out what TensorBoard holds back."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._folder.append(self._folder.metrics, [record])
        if self._writer is not None:
            write_record(self._writer, record)
