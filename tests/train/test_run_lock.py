"""A run folder has one writer, which a kill ends, whatever children it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eightgig.core.errors import EnvironmentProblem
from eightgig.train.run_lock import is_held, only_writer

HOLDER = """
import os, sys, time
from pathlib import Path
from eightgig.train.run_lock import only_writer
with only_writer(Path(sys.argv[1])):
    begun, tell = os.pipe()
    if os.fork() == 0:  # as a data worker, which outlives a killed parent for some seconds
        os.write(tell, b".")
        time.sleep(60)
        os._exit(0)
    os.read(begun, 1)  # only now has the child let go of what it inherited
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with only_writer(tmp_path):
        before = sorted(tmp_path.iterdir())
        assert is_held(tmp_path)
        with (
            pytest.raises(EnvironmentProblem, match=f"another process is training in {tmp_path}[\\s\\S]*Ctrl-C"),
            only_writer(tmp_path),
        ):
            raise AssertionError("two writers")
        assert sorted(tmp_path.iterdir()) == before
        assert is_held(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert not is_held(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert is_held(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / "run.lock").exists()  # stale
    assert not is_held(tmp_path)
    with only_writer(tmp_path):
        assert is_held(tmp_path)
    assert not tmp_path.exists()  # nothing else was in it


def test_the_lock_ends_with_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
