"""The files of a run: what is read back is what was written, whatever a crash cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.core.errors import CheckpointError, EnvironmentProblem
from eightgig.train.run_folder import RunFolder, read_jsonl

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


@pytest.mark.parametrize("status", ["failed", "interrupted", "dry run"])
def test_a_run_that_never_began_gives_its_folder_back(tmp_path: Path, status: str) -> None:
    folder = _begin(tmp_path, status=status, reason="a typo")
    for path in (folder.receipt, folder.plan, folder.data, folder.quarantine, tmp_path / "notes.txt"):
        path.write_text("{}")
    taken = _create(tmp_path)
    assert [path.name for path in taken.path.iterdir()] == ["notes.txt"]
    assert taken.read_facts() == {}


@pytest.mark.parametrize(
    ("status", "result"),
    [("running", None), ("failed", "metrics.jsonl"), ("failed", "checkpoints"), ("dry run", "generations.jsonl")],
)
def test_a_run_that_began_or_may_be_running_keeps_its_folder(tmp_path: Path, status: str, result: str | None) -> None:
    _begin(tmp_path, status=status)
    if result is not None:
        (tmp_path / result).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EnvironmentProblem, match=f"--resume {tmp_path}"):
        _create(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_only_a_run_is_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        RunFolder.open(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no run \(config\.json is missing\)"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as a model's folder has it
    with pytest.raises(CheckpointError, match=r"holds no run \(run\.json is missing\)"):
        RunFolder.open(tmp_path)
    assert RunFolder.open(_begin(tmp_path / "run").path).path == tmp_path / "run"
