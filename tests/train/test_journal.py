"""The numbers of a run go to its files, to TensorBoard where that is installed, and to the listener."""

from __future__ import annotations

import errno
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eightgig.core.errors import DoesNotFit
from eightgig.train import run_folder, tensorboard
from eightgig.train.events import SilentListener
from eightgig.train.journal import Journal
from eightgig.train.run_folder import RunFolder, read_jsonl

STEP = {"kind": "step", "step": 3, "loss": 1.5, "num_tokens": 7, "skipped": False}
VALIDATION = {"kind": "validation", "step": 3, "loss": 1.25, "exact_match": None, "num_generated": 1}
ANSWERS = [{"step": 3, "answer": "七"}]


class _Recorder(SilentListener):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_step(self, record: Any) -> None:
        self.events.append(("step", record))

    def on_validation(self, record: Any, generations: Any) -> None:
        self.events.append(("validation", (record, generations)))

    def on_checkpoint(self, path: Path, reason: str) -> None:
        self.events.append(("checkpoint", (path, reason)))


class _Writer:
    """What torch calls SummaryWriter."""

    made: list[_Writer]

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self.points: list[tuple[str, float, int]] = []
        self.is_closed = False
        _Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def with_tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[_Writer]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = _Writer  # type: ignore[attr-defined]
    _Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: ModuleSpec(name, None))
    return _Writer


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))


def _log_everything(journal: Journal, folder: Path) -> None:
    journal.step(STEP, eta_s=12.0, steps_planned=9)
    journal.validation(VALIDATION, ANSWERS)
    journal.checkpoint(folder / "step-3", "regular")
    journal.close()


@pytest.mark.usefixtures("without_tensorboard")
def test_the_main_process_writes_and_tells(tmp_path: Path) -> None:
    listener = _Recorder()
    folder = RunFolder(tmp_path)
    _log_everything(Journal(folder, listener, is_main=True), tmp_path)
    assert read_jsonl(folder.metrics) == [STEP, VALIDATION]
    assert read_jsonl(folder.generations) == ANSWERS
    assert listener.events == [
        ("step", {**STEP, "eta_s": 12.0, "steps_planned": 9}),
        ("validation", (VALIDATION, ANSWERS)),
        ("checkpoint", (tmp_path / "step-3", "regular")),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generations.jsonl", "metrics.jsonl"]


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A disk that takes nothing while the one item is true."""
    is_full = [True]
    write = run_folder._write_all

    def write_all(stream: Any, content: bytes) -> None:
        if is_full[0]:
            write(stream, content[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(stream, content)

    monkeypatch.setattr(run_folder, "_write_all", write_all)
    return is_full


@pytest.mark.usefixtures("without_tensorboard")
def test_a_log_that_goes_on_when_the_disk_is_full_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, listener = RunFolder(tmp_path), _Recorder()
    journal = Journal(folder, listener, is_main=True, goes_on_when_full=True)
    texts: list[str] = []
    monkeypatch.setattr(listener, "on_message", texts.append)
    is_full = _full_disk(monkeypatch)
    for step in (1, 2):
        journal.step(STEP | {"step": step}, eta_s=1.0, steps_planned=9)
    journal.validation(VALIDATION, ANSWERS)
    assert [read_jsonl(path) for path in (folder.metrics, folder.generations)] == [[], []]
    assert len(texts) == 1
    assert "the log waits for room: the disk is full" in texts[0]
    with pytest.raises(DoesNotFit):
        journal.sync()
    is_full[0] = False
    journal.step(STEP | {"step": 3}, eta_s=1.0, steps_planned=9)
    records = [STEP | {"step": 1}, STEP | {"step": 2}, VALIDATION, STEP | {"step": 3}]
    assert read_jsonl(folder.metrics) == records
    assert read_jsonl(folder.generations) == ANSWERS
    journal.close()


@pytest.mark.usefixtures("without_tensorboard")
def test_a_log_that_stops_when_the_disk_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    journal = Journal(folder, SilentListener(), is_main=True)
    journal.step(STEP, eta_s=1.0, steps_planned=9)
    _full_disk(monkeypatch)
    with pytest.raises(DoesNotFit, match="the disk is full"):
        journal.step(STEP | {"step": 4}, eta_s=1.0, steps_planned=9)
    assert read_jsonl(folder.metrics) == [STEP]


def test_other_processes_neither_write_nor_tell(tmp_path: Path, with_tensorboard: type[_Writer]) -> None:
    listener = _Recorder()
    _log_everything(Journal(RunFolder(tmp_path), listener, is_main=False), tmp_path)
    assert listener.events == []
    assert list(tmp_path.iterdir()) == []
    assert with_tensorboard.made == []


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, with_tensorboard: type[_Writer]) -> None:
    _log_everything(Journal(RunFolder(tmp_path), SilentListener(), is_main=True), tmp_path)
    (writer,) = with_tensorboard.made
    assert writer.log_dir == str(tmp_path / "tensorboard")
    assert writer.points == [
        ("step/loss", 1.5, 3),
        ("step/num_tokens", 7, 3),
        ("validation/loss", 1.25, 3),
        ("validation/num_generated", 1, 3),
    ]
    assert writer.is_closed
