"""Saving a run's state, keeping what must stay, and going on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from eightgig.checkpoint.retention import prune, record_best
from eightgig.checkpoint.store import read_checkpoint, write_checkpoint
from eightgig.checkpoint.training_state import training_state
from eightgig.config import WhenDiskIsFull
from eightgig.core.errors import DoesNotFit
from eightgig.core.files import scratch_folder
from eightgig.train.disk_space import check_room_for_checkpoint, check_room_for_run
from eightgig.train.fingerprint import details_of, fingerprint_of
from eightgig.train.journal import Journal
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder


class Saver:
    """Writes checkpoints of `run` below its folder, from the main process.

    Where the disk is full, a run stops, or goes on without, as `checkpoints.when_disk_is_full` says; the checkpoints
    there are stay as they are.
    """

    def __init__(self, run: Run, folder: RunFolder, journal: Journal) -> None:
        self._run = run
        self._folder = folder
        self._journal = journal

    def check_room(self) -> None:
        """Check that all the run will have on the disk fits.

        Raises:
            DoesNotFit: it does not, and the run is to stop where the disk is full.
        """
        if self._run.accelerator.is_main_process:
            with self._full_disk_heeded("going on"):
                check_room_for_run(self._run, self._folder.checkpoints)

    def save(self, step: int, *, reason: str) -> None:
        """Write the checkpoint after `step`, then delete those that need not stay.

        Raises:
            DoesNotFit: the disk is full, and the run is to stop then.
        """
        run = self._run
        if run.accelerator.is_main_process:
            with self._full_disk_heeded(f"no checkpoint after step {step}, going on without it"):
                self._save(step, reason)
        run.accelerator.wait_for_everyone()

    def rehearse(self) -> None:
        """Write a checkpoint beside the others, read it back into the run, which it leaves as it is, and delete it.

        Raises:
            DoesNotFit: the disk is full, and the run is to stop then.
        """
        run, parent = self._run, self._folder.path
        if run.accelerator.is_main_process:
            with self._full_disk_heeded("going on"), scratch_folder(parent, "rehearsal") as folder:
                path = self._write(folder, step=0)
                read_checkpoint(path, run.model, fingerprint=fingerprint_of(run))
        run.accelerator.wait_for_everyone()

    def _save(self, step: int, reason: str) -> None:
        run = self._run
        folder = self._folder.checkpoints
        self._journal.sync()  # a checkpoint is not to know of steps that the log has lost
        check_room_for_checkpoint(run, folder)
        with run.meter.phase("save"):
            path = self._write(folder, step=step)
        prune(folder, keep_last=run.config.checkpoints.keep_last, up_to_step=step)
        self._journal.checkpoint(path, reason)

    def _write(self, folder: Path, *, step: int) -> Path:
        run = self._run
        return write_checkpoint(
            folder,
            step=step,
            model=run.model,
            state=training_state(run.step),
            fingerprint=fingerprint_of(run),
            details=details_of(run),
        )

    def is_best(self, step: int, loss: float) -> bool:
        """Note the validation loss after `step`; whether it is the lowest so far (the same on every process)."""
        run = self._run
        is_best = False
        if run.accelerator.is_main_process:
            with self._full_disk_heeded(f"not noted that step {step} may be the best"):
                is_best = record_best(self._folder.checkpoints, step=step, loss=loss)
        return run.total_over_processes(int(is_best))[0] > 0

    @contextlib.contextmanager
    def _full_disk_heeded(self, what: str) -> Iterator[None]:
        """Stop the run, or go on and say `what`, where the disk is full in the block."""
        try:
            yield
        except DoesNotFit as error:
            if self._run.config.checkpoints.when_disk_is_full is WhenDiskIsFull.GO_ON:
                self._journal.message(f"{what}: {error.found}")
                return
            raise DoesNotFit(
                error.found,
                expected=error.expected,
                next_step=f"{error.next_step}; what was saved is kept: once there is room, "
                f"`eightgig train --resume {self._folder.path}` goes on",
            ) from error


def resume_from_checkpoint(run: Run, path: Path, say: Callable[[str], None]) -> int:
    """Put `run` where the checkpoint at `path` left it; returns the steps done.

    Neither the order of the data nor the random number generators are restored: both are functions of the step. What
    has changed without changing what the run computes is told through `say`.

    Raises:
        CheckpointError: the config, data or trainable weights differ.
    """
    checkpoint = read_checkpoint(path, run.model, fingerprint=fingerprint_of(run), details=details_of(run))
    if checkpoint.changes:
        say(f"changed since the checkpoint, without effect on what is learnt: {', '.join(checkpoint.changes)}")
    step = run.step
    step.optimizer.load_state_dict(checkpoint.state["optimizer"])
    step.scheduler.load_state_dict(checkpoint.state["scheduler"])
    if step.scaler is not None:
        step.scaler.load_state_dict(checkpoint.state["scaler"])
    return checkpoint.step
