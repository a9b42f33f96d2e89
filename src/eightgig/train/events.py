"""What a training run tells the outside while it runs. The loop emits, the command line draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunStart:
    """What is known when everything is loaded and the first step is about to begin."""

    run_folder: Path
    model: str
    method: str
    device: str
    precision_note: str | None
    steps_planned: int
    first_step: int
    num_train_samples: int
    num_validation_samples: int
    num_quarantined: int
    num_cut_samples: int
    num_trainable_parameters: int
    num_parameters: int
    receipt_rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunOutcome:
    """What a run (or a dry run) ended with.

    Attributes:
        status: "finished", or "dry run".
        final_loss: training loss of the last step, None after a dry run.
        exact_match_before: share of the fixed validation samples answered exactly before training, None if not asked.
        exact_match_after: the same after training.
        verification: what the fresh process found when it loaded the saved adapter; None if nothing was saved.
        peak: the run's memory record (memory.json).
    """

    run_folder: Path
    adapter_folder: Path | None
    report_path: Path | None
    steps_done: int
    status: str
    train_s: float
    final_loss: float | None
    exact_match_before: float | None
    exact_match_after: float | None
    verification: Mapping[str, Any] | None
    peak: Mapping[str, Any]


class TrainingListener(Protocol):
    """Receives the events of one run, on the main process only."""

    def on_message(self, text: str) -> None:
        """A line for the user: a stated downgrade, a slow part that begins, a thing to know."""

    def on_start(self, start: RunStart) -> None:
        """Everything is loaded; the first step comes next."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """An optimizer step is done: the record of metrics.jsonl plus `eta_s` and `steps_planned`."""

    def on_validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """A validation is done: its record of metrics.jsonl and its rows of generations.jsonl."""

    def on_checkpoint(self, path: Path, reason: str) -> None:
        """A checkpoint stands whole on the disk."""

    def on_finish(self, outcome: RunOutcome) -> None:
        """The run is over and its files are written."""


class SilentListener:
    """Listens and says nothing: for all processes but the main one, and for callers who only want the outcome."""

    def on_message(self, text: str) -> None:
        """Ignore it."""

    def on_start(self, start: RunStart) -> None:
        """Ignore it."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Ignore it."""

    def on_validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """Ignore it."""

    def on_checkpoint(self, path: Path, reason: str) -> None:
        """Ignore it."""

    def on_finish(self, outcome: RunOutcome) -> None:
        """Ignore it."""
