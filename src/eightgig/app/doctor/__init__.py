"""`eightgig doctor`: what this machine can do, what is in the way, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.app.doctor.checks import findings
from eightgig.app.doctor.finding import Finding, State
from eightgig.app.doctor.looking import look

__all__ = ["Diagnosis", "Finding", "State", "examine"]


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a machine."""

    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether everything that is meant to work does."""
        return not self.problems

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What does not."""
        return tuple(each for each in self.findings if each.state is State.PROBLEM)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain values."""
        return {"well": self.is_well, "findings": [each.to_json() for each in self.findings]}


def examine(folder: Path) -> Diagnosis:
    """Examine this machine; runs would be written in `folder`."""
    return Diagnosis(tuple(findings(look(folder))))
