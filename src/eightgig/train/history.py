"""What the log of a run says it came to; also after it was interrupted and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """Sums and ends of a run's metrics.

    Attributes:
        steps_done: the last step logged.
        train_s: time in optimizer steps and in the validations between and after them.
        final_loss: training loss of the last step, None before the first.
        exact_match_before: of the validation before training, None where no answers were generated.
        exact_match_after: of the last validation after training began, None where there was none.
    """

    steps_done: int
    train_s: float
    final_loss: float | None
    exact_match_before: float | None
    exact_match_after: float | None


def summarise(records: Sequence[Mapping[str, Any]]) -> History:
    """The history in the records of metrics.jsonl."""
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    before = [record["exact_match"] for record in validations if record["step"] == 0]
    later = [record for record in validations if record["step"] > 0]
    return History(
        steps_done=steps[-1]["step"] if steps else 0,
        train_s=sum(record["step_s"] for record in steps) + sum(record["validation_s"] for record in later),
        final_loss=steps[-1]["loss"] if steps else None,
        exact_match_before=before[-1] if before else None,
        exact_match_after=later[-1]["exact_match"] if later else None,
    )
