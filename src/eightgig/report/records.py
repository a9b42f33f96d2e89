"""Reading a run folder back: every file that a run writes, tolerant of what a stopped run has not written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.core.errors import CheckpointError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """All that a run folder tells.

    Attributes:
        folder: the run folder.
        run: run.json: state, times, versions, device, counts.
        config: config.json, the resolved TrainingConfig.
        sources: dotted path of a setting -> where its value came from.
        receipt: receipt.json, None if the model was never loaded.
        steps: the "step" records of metrics.jsonl, one a step, in order.
        validations: its "validation" records, one a step, in order.
        generations: rows of generations.jsonl, one a step and sample, in order.
        memory: memory.json, None if not measured.
        verification: verification.json, None if the adapter was not (yet) reloaded.
        quarantine: rows of quarantine.jsonl.
        best: checkpoints/best.json, None without validation.
        remarks: what was odd about the files, for the reader of the report.
    """

    folder: Path
    run: Record
    config: Record
    sources: Mapping[str, str]
    receipt: Record | None
    steps: tuple[Record, ...]
    validations: tuple[Record, ...]
    generations: tuple[Record, ...]
    memory: Record | None
    verification: Record | None
    quarantine: tuple[Record, ...]
    best: Record | None
    remarks: tuple[str, ...]


def read_run(folder: Path) -> RunRecords:
    """The records of the run in `folder`.

    Only run.json and config.json must be there. A step that a resumed run repeated counts as it was last recorded.

    Raises:
        CheckpointError: `folder` is not a run folder, or one of its files is damaged.
    """
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run: it has no run.json",
            expected="a folder that `eightgig train` has written, such as runs/NAME",
            next_step="give the folder that the run printed at its start, or look with `ls runs`",
        )
    remarks: list[str] = []
    metrics = _read_lines(folder / "metrics.jsonl", remarks)
    generations = _read_lines(folder / "generations.jsonl", remarks)
    return RunRecords(
        folder=folder,
        run=_read_object(folder / "run.json", required=True) or {},
        config=_read_object(folder / "config.json", required=True) or {},
        sources=_read_object(folder / "sources.json") or {},
        receipt=_read_object(folder / "receipt.json"),
        steps=_last_by_step(record for record in metrics if record.get("kind") == "step"),
        validations=_last_by_step(record for record in metrics if record.get("kind") == "validation"),
        generations=_last_by_step(generations, "sample_id"),
        memory=_read_object(folder / "memory.json"),
        verification=_read_object(folder / "verification.json"),
        quarantine=tuple(_read_lines(folder / "quarantine.jsonl", remarks)),
        best=_read_object(folder / "checkpoints" / "best.json"),
        remarks=tuple(remarks),
    )


def _read_object(path: Path, *, required: bool = False) -> dict[str, Any] | None:
    """The JSON object in `path`; None if there is no such file and it is not `required`."""
    if not path.is_file() and not required:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"holds a {type(value).__name__}")
    return value


def _read_lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that a killed run cut off is left out and said in `remarks`."""
    if not path.is_file():
        return []
    try:
        # not splitlines: an answer may hold a U+2028, which JSON writes as it is
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    except OSError as error:
        raise _damaged(path, str(error)) from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _parse_object(line)
        if record is None:
            where = "The last line" if number == len(lines) else "A line"
            remarks.append(f"{where} of {path.name} (line {number}) was cut off in writing and is left out.")
        else:
            records.append(record)
    return records


def _parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object that `line` is, None if it is not one."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _last_by_step(records: Iterable[Record], *more_keys: str) -> tuple[Record, ...]:
    """`records` in the order of their steps, the last one of each step (and `more_keys`)."""
    latest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        latest[record["step"], *(record.get(key) for key in more_keys)] = record
    return tuple(sorted(latest.values(), key=lambda record: int(record["step"])))


def _damaged(path: Path, what: str) -> CheckpointError:
    """The error of a file of the run folder that can't be read."""
    return CheckpointError(
        f"{path} can't be read: {what}",
        expected="the JSON that the run wrote",
        next_step="put the file back from a copy, or train again into a new folder",
    )
