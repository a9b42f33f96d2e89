"""The files of one run, and the rules for writing them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from eightgig.core.errors import CheckpointError, EnvironmentProblem
from eightgig.core.files import explained_write_errors, write_json, write_text


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of `path`; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    # Not splitlines: a generated answer may hold one of the other characters that it takes for line ends.
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
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

        Raises:
            EnvironmentProblem: `wanted` exists and holds something, or can't be made.
        """
        stem = f"{Path(model_name).name}-{datetime.now():%Y%m%d-%H%M%S}"
        path = wanted if wanted is not None else _first_free(output_dir, stem)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise EnvironmentProblem(
                f"the run folder {path} exists already and is not empty",
                expected="a folder that does not exist yet, so that no run overwrites another",
                next_step=f"choose another --run-folder, or continue that run with `eightgig train --resume {path}`",
            )
        with explained_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run folder at `path`, which must hold a run.

        Raises:
            CheckpointError: there is no run.
        """
        run = cls(path)
        if not run.config.is_file():
            raise CheckpointError(
                f"{path} holds no run ({run.config.name} is missing)",
                expected="a folder that `eightgig train` made",
                next_step="give the folder that the run printed at its start",
            )
        return run

    def read_facts(self) -> dict[str, Any]:
        """The content of run.json, empty before it is written."""
        return json.loads(self.facts.read_text(encoding="utf-8")) if self.facts.is_file() else {}

    def update_facts(self, **facts: Any) -> None:
        """Set some keys of run.json and keep the others."""
        write_json(self.facts, {**self.read_facts(), **facts})

    def append(self, path: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Add `records` to the JSONL file `path`; they are with the operating system when this returns."""
        with explained_write_errors(path), path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def forget_after(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run does those steps again."""
        for path in (self.metrics, self.generations):
            kept = [record for record in read_jsonl(path) if record["step"] <= step]
            write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _first_free(output_dir: Path, stem: str) -> Path:
    path = output_dir / stem
    number = 2
    while path.exists():
        path = output_dir / f"{stem}-{number}"
        number += 1
    return path
