"""A run folder is read as it was left, by a finished run or by one that was killed in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_run_folders import CONFIG, RECEIPT, RUN, step_record, write_jsonl, write_run

from eightgig.core.errors import CheckpointError
from eightgig.report.records import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete run folder."""
    return write_run(tmp_path / "run")


def test_a_complete_run(folder: Path) -> None:
    run = read_run(folder)
    assert run.run == RUN
    assert run.config == CONFIG
    assert run.receipt == RECEIPT
    assert [record["step"] for record in run.steps] == list(range(1, 201))
    assert run.steps[41] == step_record(42)
    assert [(record["step"], record["exact_match"]) for record in run.validations] == [
        (0, 0.0),
        (50, 0.25),
        (100, 0.5),
        (150, 0.75),
        (200, 0.875),
    ]
    assert len(run.generations) == 24
    assert len(run.quarantine) == 3
    assert run.best == {"step": 200, "loss": 0.2287}
    assert run.remarks == ()


def test_half_a_last_line_is_left_out_and_said(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    run = read_run(folder)
    assert len(run.steps) == 200
    assert len(run.validations) == 4
    assert run.remarks == ("The last line of metrics.jsonl (line 205) was cut off in writing and is left out.",)


def test_a_step_that_a_resumed_run_repeated_counts_as_last_recorded(folder: Path) -> None:
    again = step_record(7) | {"loss": 0.5}
    write_jsonl(folder / "metrics.jsonl", [step_record(6), step_record(7), step_record(8), again])
    assert [record["loss"] for record in read_run(folder).steps] == [
        step_record(6)["loss"],
        0.5,
        step_record(8)["loss"],
    ]


def test_line_separators_inside_an_answer_do_not_end_a_record(folder: Path) -> None:
    answer = "one\u2028two\u0085three"
    row = {
        "step": 0,
        "sample_id": "a",
        "images": [],
        "question": "q",
        "expected": "e",
        "answer": answer,
        "correct": False,
    }
    write_jsonl(folder / "generations.jsonl", [row])
    run = read_run(folder)
    assert [row["answer"] for row in run.generations] == [answer]
    assert run.remarks == ()


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = read_run(tmp_path)
    assert (run.steps, run.validations, run.generations, run.quarantine) == ((), (), (), ())
    assert (run.receipt, run.memory, run.verification, run.best) == (None, None, None, None)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no run\.json") as caught:
        read_run(tmp_path)
    assert str(tmp_path) in caught.value.found
    assert "ls runs" in caught.value.next_step


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\xff"])
def test_a_damaged_file_is_named(folder: Path, content: str) -> None:
    (folder / "receipt.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"receipt\.json can't be read"):
        read_run(folder)
