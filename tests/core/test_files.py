"""Files and folders appear whole or not at all, and a full disk says what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from eightgig.core.errors import DoesNotFit, EnvironmentProblem
from eightgig.core.files import explained_write_errors, whole_folder, write_json, write_text


def test_a_crash_while_writing_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_written_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    (tmp_path / "plain-folder").mkdir()
    write_text(tmp_path / "a.txt", "x")
    with whole_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain-folder").stat().st_mode


def test_a_folder_that_fails_half_way_vanishes(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_folder(tmp_path / "checkpoint") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with whole_folder(tmp_path / "adapter") as folder:
            (folder / "weights").write_text(content)
    assert (tmp_path / "adapter" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_can_not_take_its_place_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_text("old")
    replace, calls = os.replace, []

    def fails_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:  # the old folder is out of the way by then
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_second)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_power_cut_would_lose_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, and each folder that got a name in it, is synced; the order is the one that a journal needs."""
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with whole_folder(tmp_path / "runs" / "a" / "step") as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("x")
    partial = synced[-2]
    assert partial.startswith("runs/a/.step.")
    assert synced[:2] == [".", "runs"]
    assert set(synced[2:-2]) == {f"{partial}/adapter", f"{partial}/adapter/weights"}
    assert synced[-1] == "runs/a"


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENOSPC, DoesNotFit, "the disk is full"),
        (errno.EACCES, EnvironmentProblem, "can't be written"),
        (errno.EROFS, EnvironmentProblem, "can't be written"),
        (errno.EDQUOT, DoesNotFit, "the disk is full"),
        (errno.EFBIG, DoesNotFit, "can't be written: File too large"),
        (errno.ENAMETOOLONG, EnvironmentProblem, "can't be made: File name too long"),
    ],
)
def test_disk_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception], words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=words) as caught:
        write_json(tmp_path / "run.json", {"a": 1})
    assert "--output-dir" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    for write in (lambda: write_text(tmp_path / "runs" / "a" / "b.txt", "x"), lambda: enter(tmp_path / "runs" / "a")):
        with pytest.raises(EnvironmentProblem, match=r"can't be made: .*runs is a file"):
            write()
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def enter(folder: Path) -> None:
    with whole_folder(folder):
        pass


def test_the_errors_of_safetensors_are_read_by_their_number(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the disk is full"), explained_write_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="invalid header"), explained_write_errors(tmp_path):
        raise SafetensorError("Error while deserializing header: invalid header length")
