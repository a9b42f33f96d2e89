"""A disk without room, before and in the middle of a run; a second writer; clocks that jump: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.app.command_line import NOTHING, CommandLine, check_message
from tests.app.listening import Listener

from eightgig.app.training import resume
from eightgig.checkpoint import store
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import verify_checkpoint
from eightgig.config import TrainingConfig
from eightgig.core.errors import DoesNotFit
from eightgig.train import disk_space
from eightgig.train.events import RunOutcome
from eightgig.train.run_lock import only_writer

Train = Callable[..., RunOutcome]
MakeConfig = Callable[..., TrainingConfig]
Usage = namedtuple("Usage", "total used free")
GO_ON = {"every_steps": 2, "keep_last": 3, "when_disk_is_full": "go_on"}


def has_free(monkeypatch: pytest.MonkeyPatch, free_bytes: Callable[[], int]) -> None:
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free_bytes()))


def steps_saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_paths(run / "checkpoints")]


def steps_logged(run: Path) -> list[int]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == "step"]


def test_a_run_that_will_not_fit_the_disk_ends_before_its_first_step(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_free(monkeypatch, lambda: 1000)
    with pytest.raises(DoesNotFit, match="the disk is nearly full: the checkpoints of this run") as caught:
        run_training(tiny_config())
    assert "lower checkpoints.keep_last" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_a_run_will_take_is_what_it_then_has_on_the_disk(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told after the first step; measured at the end: what stays, one more checkpoint, and the adapter."""
    asked: list[int] = []
    monkeypatch.setattr(disk_space, "_check", lambda folder, needed_bytes, what: asked.append(needed_bytes))
    run = run_training(tiny_config(checkpoints={"every_steps": 1, "keep_last": 2})).run_folder
    before_first_step, after_first_step = asked[:2]
    assert before_first_step < after_first_step
    paths = checkpoint_paths(run / "checkpoints")
    sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in paths]
    adapter_bytes = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert after_first_step == pytest.approx(4 * max(sizes) + adapter_bytes, rel=0.3)  # without headers and JSON
    assert after_first_step < 4 * max(sizes) + adapter_bytes


@pytest.mark.parametrize("when", ["stop", "go_on"])
def test_a_disk_that_fills_up_in_the_middle(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Steps 2, 4 and 6 are due; the disk is full for the middle one."""
    save_file, calls, run = store.save_file, [], tmp_path / "run"

    def full_once(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if run / "checkpoints" not in path.parents:  # the rehearsal's
            return
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "save_file", full_once)
    listener = Listener()
    config = tiny_config(checkpoints=GO_ON | {"when_disk_is_full": when})
    if when == "stop":
        with pytest.raises(DoesNotFit, match="the disk is full") as caught:
            run_training(config, listener=listener)
        assert f"`eightgig train --resume {run}` goes on" in str(caught.value)
        assert steps_saved(run) == [2]
        assert steps_logged(run) == [1, 2, 3, 4]
        resume(run)
        assert steps_saved(run) == [2, 4, 6]
    else:
        assert run_training(config, listener=listener).steps_done == 6
        assert [text for text in listener.texts if text.startswith("no checkpoint after step 4, going on without it")]
        assert steps_saved(run) == [2, 6]
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    for path in checkpoint_paths(run / "checkpoints"):
        verify_checkpoint(path)
    assert not [path for path in run.rglob(".*")]


def test_no_write_is_begun_where_the_room_is_known_to_be_too_little(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    has_free(monkeypatch, lambda: 1 << 40 if not (run / "checkpoints" / "step-00000002").exists() else 10)
    listener = Listener()
    assert run_training(tiny_config(checkpoints=GO_ON), listener=listener).steps_done == 6
    assert steps_saved(run) == [2]
    said = [text for text in listener.texts if "no checkpoint after step" in text]
    assert len(said) == 2
    assert "a checkpoint takes" in said[0]


def test_a_run_that_is_running_is_not_resumed_a_second_time(
    eightgig: CommandLine, tiny_config: MakeConfig, run_training: Train, tmp_path: Path
) -> None:
    class Stopping(Listener):
        def on_step(self, record: Any) -> None:
            if record["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config(), listener=Stopping())
    with only_writer(tmp_path / "run"):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        ended = eightgig("train", "--resume", "run")
        check_message(ended, 6, "another process is training in run", "wait until it has ended")
        assert ended.new == NOTHING
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    for left in ("run.lock", ".metrics.jsonl.0123456789abcdef0123456789abcdef.partial"):  # of a writer that was killed
        (tmp_path / "run" / left).touch()
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step-00000002",
        tmp_path / "run" / "checkpoints" / ".step-00000004.0123456789abcdef0123456789abcdef.partial",
    )
    assert eightgig("train", "--resume", "run").code == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if "partial" in path.name or path.name == "run.lock"]


def test_a_clock_that_jumps_back_changes_nothing(
    tiny_config: MakeConfig, run_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [2e9]

    def backwards() -> float:
        now_s[0] -= 3600.0
        return now_s[0]

    monkeypatch.setattr(time, "time", backwards)
    outcome = run_training(tiny_config(training={"max_steps": 3}))
    records = list(map(json.loads, (outcome.run_folder / "metrics.jsonl").read_text().splitlines()))
    assert outcome.train_s > 0
    for record in records:
        assert record["loss"] > 0
        assert all(0 <= value < 600 for name, value in record.items() if name.endswith("_s") and "per" not in name)


def test_a_slow_disk_costs_only_time(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    assert run_training(tiny_config(training={"max_steps": 2})).steps_done == 2
    for path in checkpoint_paths(tmp_path / "run" / "checkpoints"):
        verify_checkpoint(path)
