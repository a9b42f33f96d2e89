"""The one tree of errors a user can meet.

EightGigError
├── ConfigError          a setting is wrong or contradicts another (all problems of a file at once)
├── DataError            a data set can't be used
├── DoesNotFit           memory (GPU, RAM or disk) does not suffice
├── UnsupportedModel     the model is not known, or can't be handled
├── EnvironmentProblem   the machine, a package, the network or a permission is in the way
├── CheckpointError      a run folder or checkpoint is missing, damaged or does not match
└── TrainingDiverged     loss or gradients stay without a finite value

Each says what was found, what was expected and what to do next. Only `cli` turns them into exit codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class EightGigError(Exception):
    """Base of all errors that are shown to a user without a traceback.

    Args:
        found: what was met, with the value itself.
        expected: what would have been right.
        next_step: what to do or to type next.
    """

    exit_code = 1

    def __init__(self, found: str, *, expected: str, next_step: str) -> None:
        self.found = found
        self.expected = expected
        self.next_step = next_step
        super().__init__(f"{found}\n  expected: {expected}\n  next: {next_step}")


@dataclass(frozen=True)
class Problem:
    """One wrong setting: where it stands, what it was, what is allowed."""

    path: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path} = {self.value}: {self.allowed}"


class ConfigError(EightGigError):
    """One or more settings are wrong; `problems` lists every one of them."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], *, source: str, next_step: str) -> None:
        self.problems = tuple(problems)
        self.source = source
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(
            f"{source}: {len(self.problems)} {noun} in the configuration\n{lines}",
            expected="every setting within what is allowed",
            next_step=next_step,
        )


class DataError(EightGigError):
    """A data file, its images or its share of bad samples can't be used."""

    exit_code = 3


class DoesNotFit(EightGigError):
    """The run needs more memory or disk than there is."""

    exit_code = 4


class UnsupportedModel(EightGigError):
    """The model's name is unknown, or its architecture can't be handled."""

    exit_code = 5


class EnvironmentProblem(EightGigError):
    """The machine, an installed package, the network or a permission stands in the way."""

    exit_code = 6


class CheckpointError(EightGigError):
    """A run folder or checkpoint is missing, damaged, or does not belong to this run."""

    exit_code = 7


class TrainingDiverged(EightGigError):
    """Loss or gradients were no finite numbers in so many steps in a row that going on would learn nothing."""

    exit_code = 8
