"""Which checkpoints stay, and which one counts as the best after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightgig.checkpoint.retention import (
    checkpoint_paths,
    forget_best_after,
    newest_sound_checkpoint,
    prune,
    read_best,
    record_best,
    remove_unfinished,
)
from eightgig.core.errors import CheckpointError


def _steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_paths(folder)]


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        (tmp_path / f"step-{step:08d}").mkdir()
    record_best(tmp_path, step=2, loss=0.5)
    deleted = prune(tmp_path, keep_last=2)
    assert _steps(tmp_path) == [2, 6, 7]
    assert len(deleted) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_newer_one_does_not_cost_the_one_just_written(tmp_path: Path) -> None:
    """A run that went on before step 9, which is damaged, has saved step 6."""
    for step in (3, 6, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    prune(tmp_path, keep_last=1, up_to_step=6)
    assert _steps(tmp_path) == [6, 9]


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").mkdir()
    for name in (".step-00000001.deleted", f".step-00000004.{'a1' * 16}.partial"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "weights").touch()
    (tmp_path / f".best.json.{'0' * 32}.partial").touch()
    (tmp_path / ".nfs0001").touch()  # not ours
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".nfs0001", "step-00000003"]
    remove_unfinished(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_a_best_step_that_is_still_to_come_is_forgotten(tmp_path: Path) -> None:
    record_best(tmp_path, step=4, loss=1.0)
    forget_best_after(tmp_path, 4)
    assert read_best(tmp_path) == {"step": 4, "loss": 1.0}
    forget_best_after(tmp_path, 3)
    assert read_best(tmp_path) is None
    forget_best_after(tmp_path, 3)


def test_only_a_lower_loss_is_better(tmp_path: Path) -> None:
    assert [record_best(tmp_path, step=step, loss=loss) for step, loss in ((1, 2.0), (2, 2.0), (3, 1.5), (4, 1.6))] == [
        True,
        False,
        True,
        False,
    ]
    assert read_best(tmp_path) == {"step": 3, "loss": 1.5}


def test_the_best_step_is_the_best_again_when_a_resumed_run_repeats_it(tmp_path: Path) -> None:
    """A crash between noting the best step and writing its checkpoint must not lose that checkpoint for good."""
    record_best(tmp_path, step=3, loss=1.5)
    assert not record_best(tmp_path, step=2, loss=1.7)
    assert record_best(tmp_path, step=3, loss=1.5)


def test_a_damaged_note_of_the_best_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged[\s\S]*delete .*best\.json and resume"):
        record_best(tmp_path, step=1, loss=1.0)


def test_without_a_sound_checkpoint_each_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    said: list[str] = []
    with pytest.raises(CheckpointError, match="holds no usable checkpoint"):
        newest_sound_checkpoint(tmp_path, said.append)
    assert ["step-00000004" in said[0], "step-00000002" in said[1], len(said)] == [True, True, 2]
