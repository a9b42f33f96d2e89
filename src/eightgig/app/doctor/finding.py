"""One line of the doctor's: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class State(Enum):
    """How a finding is to be taken."""

    FINE = "fine"
    NOTE = "note"  # nothing is wrong, and it decides what will work
    WARNING = "warning"  # works, worse than it could
    PROBLEM = "problem"  # something that is meant to work does not


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    Attributes:
        name: of the thing.
        found: as it is.
        todo: what to do about it; empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    todo: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {**asdict(self), "state": self.state.value}
