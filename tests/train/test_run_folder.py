"""The files of a run: what is read back is what was written, whatever a crash cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.core.errors import CheckpointError, EnvironmentProblem
from eightgig.train.run_folder import RunFolder, read_jsonl
from eightgig.train.run_lock import only_writer

RECORDS = st.lists(
    st.fixed_dictionaries({"step": st.integers(0, 9), "answer": st.text(max_size=8), "loss": st.floats(0, 1e3)}),
    min_size=1,
    max_size=6,
)


def _create(path: Path | None, output_dir: Path = Path("runs"), model_name: str = "m") -> RunFolder:
    return RunFolder.create(path, output_dir=output_dir, model_name=model_name)


def _begin(path: Path, **facts: Any) -> RunFolder:
    """A run folder with what a run writes first."""
    folder = _create(path)
    folder.config.write_text("{}")
    folder.sources.write_text("{}")
    folder.update_facts(**({"status": "running"} | facts))
    return folder


@given(records=RECORDS, data=st.data())
def test_a_cut_in_the_last_line_costs_that_record_alone(
    records: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.append(folder.metrics, records)
    assert read_jsonl(folder.metrics) == records
    content = folder.metrics.read_bytes()
    last_line = content[:-1].rfind(b"\n") + 1
    folder.metrics.write_bytes(content[: data.draw(st.integers(last_line, len(content) - 2))])
    assert read_jsonl(folder.metrics) == records[:-1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"m\.jsonl is damaged: line 2[\s\S]*delete line 2"):
        read_jsonl(tmp_path / "m.jsonl")


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_what_was_logged_after_the_step_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for path in (folder.metrics, folder.generations):
        folder.append(path, [{"step": step, "answer": "a\u2028b 七"} for step in (0, 1, 2, 2, 3)])
    folder.forget_after(2)
    for path in (folder.metrics, folder.generations):
        assert [record["step"] for record in read_jsonl(path)] == [0, 1, 2, 2]
        assert {record["answer"] for record in read_jsonl(path)} == {"a\u2028b 七"}


def test_facts_are_added_to_those_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_facts() == {}
    folder.update_facts(status="running", seed=1)
    folder.update_facts(status="finished")
    assert json.loads(folder.facts.read_text()) == {"status": "finished", "seed": 1}


def test_folders_of_one_second_get_numbers(tmp_path: Path) -> None:
    paths = [_create(None, tmp_path / "runs", "some/llava-7b").path for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path.is_dir() and path.name.startswith("llava-7b-") for path in paths)


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    assert _create(tmp_path).path == tmp_path
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(EnvironmentProblem, match="not empty") as caught:
        _create(tmp_path)
    assert "--resume" not in str(caught.value)  # there is no run to go on with


# "running" is what a kill leaves: a process that is running holds the lock.
@pytest.mark.parametrize("status", ["failed", "interrupted", "dry run", "running"])
def test_a_run_that_never_began_gives_its_folder_back(tmp_path: Path, status: str) -> None:
    folder = _begin(tmp_path, status=status, reason="a typo")
    for path in (folder.receipt, folder.plan, folder.data, folder.quarantine, tmp_path / "notes.txt"):
        path.write_text("{}")
    taken = _create(tmp_path)
    assert [path.name for path in taken.path.iterdir()] == ["notes.txt"]
    assert taken.read_facts() == {}


@pytest.mark.parametrize(
    ("status", "result"),
    [
        ("running", "metrics.jsonl"),
        ("failed", "metrics.jsonl"),
        ("failed", "checkpoints"),
        ("dry run", "generations.jsonl"),
    ],
)
def test_a_run_that_began_keeps_its_folder(tmp_path: Path, status: str, result: str) -> None:
    _begin(tmp_path, status=status)
    (tmp_path / result).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EnvironmentProblem, match=f"--resume {tmp_path}"):
        _create(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_is_running_keeps_its_folder(tmp_path: Path) -> None:
    _begin(tmp_path)
    with only_writer(tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(EnvironmentProblem, match=f"another process is training in {tmp_path}"):
            _create(tmp_path)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "left",
    [
        ["run.lock"],
        ["run.lock", f".run.json.{'0' * 32}.partial"],
        ["run.lock", "run.json"],
        ["run.lock", "run.json", f".config.json.{'0' * 32}.partial"],
        ["run.lock", "run.json", "config.json", "sources.json", f".data.json.{'0' * 32}.partial"],
    ],
)
def test_a_kill_at_the_very_start_gives_the_folder_back(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text('{"status": "running"}')
    assert _create(tmp_path).path == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_runs_own_is_no_kill(tmp_path: Path) -> None:
    for name in ("run.lock", "thesis.txt"):
        (tmp_path / name).touch()
    with pytest.raises(EnvironmentProblem, match="not empty"):
        _create(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("num_whole", [0, 3])
def test_a_record_that_does_not_fit_leaves_no_half_line(tmp_path: Path, num_whole: int) -> None:
    """A disk that takes a part of a line and then no more: what it took is cut off again."""
    folder = RunFolder(tmp_path)
    folder.append(folder.metrics, [{"step": step} for step in range(num_whole)])
    before = folder.metrics.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from eightgig.train.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "limit = folder.metrics.stat().st_size + 20\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try:\n"
        "    folder.append(folder.metrics, [{'step': 9, 'answer': 'x' * 100}])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout == "DoesNotFit\n", done.stderr
    assert folder.metrics.read_bytes() == before


def test_only_a_run_is_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no run \(config\.json is missing\)"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as a model's folder has it
    with pytest.raises(CheckpointError, match=r"holds no run \(run\.json is missing\)"):
        RunFolder.open(tmp_path)
    assert RunFolder.open(_begin(tmp_path / "run").path).path == tmp_path / "run"
