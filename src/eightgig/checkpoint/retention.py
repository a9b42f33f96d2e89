"""Which checkpoints of a run stay: the last few and the best one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eightgig.checkpoint.store import step_folder_name, verify_checkpoint
from eightgig.core.errors import CheckpointError
from eightgig.core.files import remove_leftovers, write_json

BEST = "best.json"
_DELETED = ".deleted"


def checkpoint_paths(folder: Path) -> list[Path]:
    """All checkpoints below `folder`, oldest first; unfinished ones have hidden names and are not seen."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_best(folder: Path) -> dict[str, Any] | None:
    """`{"step", "loss"}` of the checkpoint with the lowest validation loss so far, None before there is one.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / BEST
    if not path.is_file():
        return None
    try:
        best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise CheckpointError(
            f"{path} is damaged: {error}",
            expected="the step and loss of the best checkpoint, as JSON",
            next_step=f"delete {path} and resume: the next validation counts as the best so far",
        ) from error
    return best


def record_best(folder: Path, *, step: int, loss: float) -> bool:
    """Note the checkpoint after `step` as the best if `loss` is the lowest so far; returns whether it is.

    A resumed run may come to the best step again: it is still the best then, and may have no checkpoint yet.
    """
    best = read_best(folder)
    if best is not None and best["step"] != step and best["loss"] <= loss:
        return False
    write_json(folder / BEST, {"step": step, "loss": loss})
    return True


def forget_best_after(folder: Path, step: int) -> None:
    """Forget the best step if it comes after `step`: a run that goes on from there comes to it again."""
    best = read_best(folder)
    if best is not None and best["step"] > step:
        (folder / BEST).unlink()


def prune(folder: Path, *, keep_last: int, up_to_step: int | None = None) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last` and the best one; returns what was deleted.

    Those after `up_to_step`, damaged ones that a run went on before, neither count nor are deleted: the run writes them
    anew when it comes there.
    """
    best = read_best(folder)
    best_name = step_folder_name(best["step"]) if best is not None else None
    paths = checkpoint_paths(folder)
    if up_to_step is not None:
        paths = [path for path in paths if path.name <= step_folder_name(up_to_step)]
    doomed = [path for path in paths[:-keep_last] if path.name != best_name]
    for path in doomed:
        # Renamed first, so that a crash in the middle leaves no half checkpoint that looks whole.
        hidden = path.with_name(f".{path.name}{_DELETED}")
        path.rename(hidden)
        shutil.rmtree(hidden)
    return doomed


def remove_unfinished(folder: Path) -> None:
    """Delete what a process left below `folder` that was killed while it wrote or deleted a checkpoint."""
    remove_leftovers(folder)
    for hidden in folder.glob(f".step-*{_DELETED}"):
        shutil.rmtree(hidden)


def newest_sound_checkpoint(folder: Path, say: Callable[[str], None]) -> Path:
    """The newest checkpoint that passes verification; damaged newer ones are named through `say`.

    Raises:
        CheckpointError: there is none.
    """
    for path in reversed(checkpoint_paths(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            say(f"skipped: {error.found}")
            continue
        return path
    raise CheckpointError(
        f"{folder} holds no usable checkpoint",
        expected="at least one step-* folder that was written to its end",
        next_step="start the run anew with `eightgig train`",
    )
