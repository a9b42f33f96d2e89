"""Whether what a run will write has room on the disk, told before it is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import checkpoint_bytes
from eightgig.checkpoint.training_state import training_state
from eightgig.config import TrainingMethod
from eightgig.core.errors import DoesNotFit
from eightgig.core.files import existing_parent
from eightgig.core.units import format_bytes
from eightgig.models.trainable import trainable_parameters
from eightgig.train.run import Run


def check_room_for_checkpoint(run: Run, folder: Path) -> None:
    """Check that one more checkpoint fits into `folder`.

    Raises:
        DoesNotFit: it does not.
    """
    _check(folder, checkpoint_bytes(run.model, training_state(run.step)), "a checkpoint takes")


def check_room_for_run(run: Run, folder: Path) -> None:
    """Check that all the run will have on the disk at one time fits: checkpoints in `folder`, one more while it is
    written, and the result.

    Exact once the optimizer has states, from the first step on; before, that they are missing makes it too little.

    Raises:
        DoesNotFit: it does not.
    """
    one_bytes = checkpoint_bytes(run.model, training_state(run.step))
    there_bytes = sum(file.stat().st_size for path in checkpoint_paths(folder) for file in path.rglob("*"))
    checkpoints_bytes = max(0, _num_at_one_time(run) * one_bytes - there_bytes)
    needed_bytes = checkpoints_bytes + _result_bytes(run)
    _check(folder, needed_bytes, f"the checkpoints of this run ({format_bytes(one_bytes)} each) and its result take")


def _num_at_one_time(run: Run) -> int:
    """Checkpoints that lie on the disk at one time: those that stay, the best, and the one being written."""
    settings = run.config
    num_best = int(bool(run.data.validation))
    num_written = run.num_steps // settings.checkpoints.every_steps + 1
    if num_best:
        num_written += run.num_steps // (settings.validation.every_steps or run.num_steps)
    return min(settings.checkpoints.keep_last + num_best + 1, num_written)


def _result_bytes(run: Run) -> int:
    is_full = run.config.training.method is TrainingMethod.FULL
    saved = run.model.parameters() if is_full else trainable_parameters(run.model).values()
    return sum(parameter.numel() * parameter.element_size() for parameter in saved)


def _check(folder: Path, needed_bytes: int, what: str) -> None:
    free_bytes = shutil.disk_usage(existing_parent(folder)).free
    if free_bytes < needed_bytes:
        raise DoesNotFit(
            f"the disk is nearly full: {what} {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free",
            expected=f"enough free disk space where {folder} is",
            next_step="free some space, lower checkpoints.keep_last, or choose another disk with --output-dir",
        )
