"""The real command on the tiny model: what it was given, what it said, and what it left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eightgig.cli.entry import run_command

NOTHING: frozenset[str] = frozenset()
# What a run leaves that set samples aside and ended before its first step.
QUARANTINED = frozenset({"run", "run/config.json", "run/run.json", "run/sources.json", "run/quarantine.jsonl"})


@dataclass(frozen=True)
class Ended:
    """How a call of the command ended.

    Attributes:
        new: paths that were not there before, relative to the folder of the test.
    """

    code: int
    out: str
    err: str
    new: frozenset[str]


class CommandLine:
    """Runs `eightgig` in a folder of the test's own, on the tiny model and data."""

    def __init__(self, folder: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.model = model
        self.data = data
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ended:
        """Run the command as it is typed."""
        before = self.listing()
        self._capsys.readouterr()
        code = run_command(arguments)
        said = self._capsys.readouterr()
        return Ended(code, said.out, said.err, self.listing() - before)

    def train(self, *arguments: str, settings: dict[str, Any] | None = None) -> Ended:
        """Dry run into `run` with settings from a file; `arguments` come last and win."""
        path = self.folder / "tiny.json"
        if settings is None:
            settings = {"model": {"name": str(self.model)}, "data": {"data_path": str(self.data), "num_workers": 0}}
            settings |= {"hardware": {"device": "cpu", "mixed_precision": "fp32"}}
        path.write_text(json.dumps(settings))
        where = [] if {"--run-folder", "--output-dir"} & set(arguments) else ["--run-folder", "run"]
        return self("train", path.name, "--dry-run", *where, *arguments)

    def listing(self) -> frozenset[str]:
        """All files and folders below the test's folder."""
        return frozenset(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*"))


def check_message(ended: Ended, code: int, *said: str) -> None:
    """Assert that the command failed with `code` and said each of `said`, in order, as an error for a user."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert "something unexpected" not in ended.err
    message = ended.err[ended.err.index("error: ") :]
    for text in (*said, "\n  next: "):
        assert text in message
    assert "\n  expected: " in message
    places = [message.index(text) for text in said]
    assert places == sorted(places)
    assert not [path for path in ended.new if "partial" in path or "/." in path]


Arrange = Callable[[CommandLine], list[str]]
