"""Saving a run's state, keeping what must stay, and going on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from eightgig.checkpoint.retention import prune, record_best
from eightgig.checkpoint.store import read_checkpoint, write_checkpoint
from eightgig.checkpoint.training_state import training_state
from eightgig.core.files import explained_write_errors
from eightgig.train.journal import Journal
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder


class Saver:
    """Writes checkpoints of `run` below its folder, from the main process."""

    def __init__(self, run: Run, folder: RunFolder, journal: Journal, fingerprint: Mapping[str, str]) -> None:
        self._run = run
        self._checkpoints = folder.checkpoints
        self._journal = journal
        self._fingerprint = fingerprint

    def save(self, step: int, *, reason: str) -> None:
        """Write the checkpoint after `step`, then delete those that need not stay."""
        run = self._run
        if run.accelerator.is_main_process:
            with run.meter.phase("save"):
                path = self._write(self._checkpoints, step=step)
            prune(self._checkpoints, keep_last=run.config.checkpoints.keep_last)
            self._journal.checkpoint(path, reason)
        run.accelerator.wait_for_everyone()

    def rehearse(self) -> None:
        """Write a checkpoint beside the others, read it back into the run, which it leaves as it is, and delete it."""
        run = self._run
        if run.accelerator.is_main_process:
            parent = self._checkpoints.parent
            with explained_write_errors(parent), TemporaryDirectory(prefix=".rehearsal-", dir=parent) as folder:
                path = self._write(Path(folder), step=0)
                read_checkpoint(path, run.model, fingerprint=self._fingerprint)
        run.accelerator.wait_for_everyone()

    def _write(self, checkpoints: Path, *, step: int) -> Path:
        run = self._run
        return write_checkpoint(
            checkpoints, step=step, model=run.model, state=training_state(run.step), fingerprint=self._fingerprint
        )

    def is_best(self, step: int, loss: float) -> bool:
        """Note the validation loss after `step`; whether it is the lowest so far (the same on every process)."""
        run = self._run
        best = run.accelerator.is_main_process and record_best(self._checkpoints, step=step, loss=loss)
        return run.total_over_processes(int(best))[0] > 0


def resume_from_checkpoint(run: Run, path: Path, fingerprint: Mapping[str, str]) -> int:
    """Put `run` where the checkpoint at `path` left it; returns the steps done.

    Neither the order of the data nor the random number generators are restored: both are functions of the step.

    Raises:
        CheckpointError: the config, data or trainable weights differ.
    """
    checkpoint = read_checkpoint(path, run.model, fingerprint=fingerprint)
    step = run.step
    step.optimizer.load_state_dict(checkpoint.state["optimizer"])
    step.scheduler.load_state_dict(checkpoint.state["scheduler"])
    if step.scaler is not None:
        step.scaler.load_state_dict(checkpoint.state["scaler"])
    return checkpoint.step
