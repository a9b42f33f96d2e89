"""The files of one run, and the rules for writing them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from eightgig.core.errors import CheckpointError, EnvironmentProblem
from eightgig.core.files import (
    explained_write_errors,
    fsync_path,
    make_folder,
    remove_leftovers,
    write_json,
    write_text,
)
from eightgig.train.run_lock import LOCK, held_by_another, is_held, remove_lock_file


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of `path`; a last line that a crash cut short is left out.

    Raises:
        CheckpointError: a line before the last is damaged.
    """
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    # Not splitlines: a generated answer may hold one of the other characters that it takes for line ends. And a crash
    # may have cut a letter of several bytes in two, which no strict decoder would take.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, start=1) if line), default=0)
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number != last:
                raise CheckpointError(
                    f"{path} is damaged: line {number} is no JSON ({error.msg})",
                    expected="one JSON record a line, as the run wrote them",
                    next_step=f"delete line {number}, or put the file back from a copy",
                ) from error
    return records


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, below `path`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved TrainingConfig."""
        return self.path / "config.json"

    @property
    def sources(self) -> Path:
        """Where each setting came from."""
        return self.path / "sources.json"

    @property
    def facts(self) -> Path:
        """Status, versions, device and counts."""
        return self.path / "run.json"

    @property
    def receipt(self) -> Path:
        """What is 4-bit and what is not."""
        return self.path / "receipt.json"

    @property
    def metrics(self) -> Path:
        """One record a step and a validation."""
        return self.path / "metrics.jsonl"

    @property
    def generations(self) -> Path:
        """Generated answers."""
        return self.path / "generations.jsonl"

    @property
    def plan(self) -> Path:
        """The memory that was planned before the weights were loaded; only of a run on a GPU."""
        return self.path / "plan.json"

    @property
    def recovery(self) -> Path:
        """The levers that were switched on when memory ran out, and when; only of a run in which it did."""
        return self.path / "recovery.json"

    @property
    def memory(self) -> Path:
        """Peak memory by category."""
        return self.path / "memory.json"

    @property
    def verification(self) -> Path:
        """What the fresh process found."""
        return self.path / "verification.json"

    @property
    def quarantine(self) -> Path:
        """Samples left out, each with its reason."""
        return self.path / "quarantine.jsonl"

    @property
    def non_finite(self) -> Path:
        """The batches of steps that were skipped for a loss or gradient without a finite value."""
        return self.path / "non_finite"

    @property
    def data(self) -> Path:
        """The data files with their hashes, and what the check counted."""
        return self.path / "data.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @classmethod
    def create(cls, wanted: Path | None, *, output_dir: Path, model_name: str) -> RunFolder:
        """A new, empty run folder: `wanted`, or one named by model and time below `output_dir`.

        A `wanted` folder whose run ended before its first step (a wrong path, a dry run, a kill) is taken anew.

        Raises:
            EnvironmentProblem: `wanted` exists and holds something else or a run that is running, or can't be made.
        """
        stem = f"{Path(model_name).name}-{datetime.now():%Y%m%d-%H%M%S}"
        with explained_write_errors(wanted or output_dir):
            path = wanted if wanted is not None else _first_free(output_dir, stem)
            run = cls(path)
            if is_held(path):
                raise held_by_another(path)
            was_removed = run.remove_if_never_begun()
            if not was_removed and path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise _taken(run)
            make_folder(path)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run folder at `path`, which must hold a run.

        Raises:
            CheckpointError: there is no run.
        """
        run = cls(path)
        missing = next((file for file in (run.config, run.facts) if not file.is_file()), None)
        if missing is not None:
            raise CheckpointError(
                f"{path} holds no run ({missing.name} is missing)" if path.exists() else f"there is no folder {path}",
                expected="a folder that `eightgig train` made",
                next_step="give the folder that the run printed at its start",
            )
        return run

    @property
    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file() and self.facts.is_file()

    @property
    def has_quarantined(self) -> bool:
        """Whether samples were set aside, which the user will want to see."""
        return self.quarantine.is_file() and self.quarantine.stat().st_size > 0

    @property
    def _was_killed_at_once(self) -> bool:
        """Whether a run was killed here while it wrote its first file: there are its lock and a part of the file."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return LOCK in names and all(name == LOCK or name.startswith(f".{self.facts.name}.") for name in names)

    def remove_if_never_begun(self) -> bool:
        """Delete what a run left that ended before its first step: one with neither numbers nor checkpoints.

        A run that is running is left alone, and so are files that are not a run's own. That its status is "running"
        says nothing, since one that was killed has it too; that a process holds its lock does. Returns whether it was
        deleted.
        """
        has_results = any(path.exists() for path in (self.metrics, self.generations, self.checkpoints))
        is_running = self.read_facts().get("status") == "running" and is_held(self.path)
        if has_results or is_running or not (self.facts.is_file() or self._was_killed_at_once):
            return False
        remove_leftovers(self.path)
        if not is_held(self.path):
            remove_lock_file(self.path)
        before_steps = (self.config, self.sources, self.receipt, self.plan, self.data, self.quarantine, self.recovery)
        for file in (*before_steps, self.facts):
            file.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()
        return True

    def read_facts(self) -> dict[str, Any]:
        """The content of run.json, empty before it is written.

        Raises:
            CheckpointError: it is damaged.
        """
        if not self.facts.is_file():
            return {}
        try:
            facts: dict[str, Any] = json.loads(self.facts.read_text(encoding="utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
            raise CheckpointError(
                f"{self.facts} is damaged: {error}",
                expected="the JSON that the run wrote",
                next_step="put the file back from a copy, or train again into a new folder",
            ) from error
        return facts

    def update_facts(self, **facts: Any) -> None:
        """Set some keys of run.json and keep the others."""
        write_json(self.facts, {**self.read_facts(), **facts})

    def append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Add `records` to the JSONL file `path`, all or none; they are with the operating system when this returns."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with (
            explained_write_errors(path),
            path.open("ab", buffering=0) as stream,
            contextlib.ExitStack() as on_failure,
        ):
            on_failure.callback(stream.truncate, stream.tell())
            _write_all(stream, lines.encode())
            on_failure.pop_all()

    def sync_logs(self) -> None:
        """Put what was logged on the disk, so that a power cut takes nothing that was before a checkpoint."""
        for path in (self.metrics, self.generations):
            if path.is_file():
                with explained_write_errors(path):
                    fsync_path(path)

    def has_validated(self, step: int) -> bool:
        """Whether the validation after `step` is in the log."""
        return any(record["kind"] == "validation" and record["step"] == step for record in read_jsonl(self.metrics))

    def forget_after(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run does those steps again."""
        for path in (self.metrics, self.generations):
            kept = [record for record in read_jsonl(path) if record["step"] <= step]
            write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _write_all(stream: io.FileIO, content: bytes) -> None:
    """Write all of `content`: the system may take a part only, as where the disk is nearly full."""
    while content:
        content = content[stream.write(content) :]


def _taken(run: RunFolder) -> EnvironmentProblem:
    """The error of a wanted run folder that holds something."""
    other = f", or continue that run with `eightgig train --resume {run.path}`" if run.is_run else ""
    return EnvironmentProblem(
        f"the run folder {run.path} exists already and is not empty"
        if run.path.is_dir()
        else f"{run.path} is a file, not a folder",
        expected="a folder that does not exist yet, so that no run overwrites another",
        next_step=f"choose another --run-folder{other}",
    )


def _first_free(output_dir: Path, stem: str) -> Path:
    path = output_dir / stem
    number = 2
    while path.exists():
        path = output_dir / f"{stem}-{number}"
        number += 1
    return path
