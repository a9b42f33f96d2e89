"""What a log comes to, against sums made by hand."""

from __future__ import annotations

from typing import Any

from eightgig.train.history import History, summarise


def _step(step: int, loss: float, step_s: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": loss, "step_s": step_s}


def _validation(step: int, exact_match: float | None, validation_s: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "loss": 9.0, "exact_match": exact_match, "validation_s": validation_s}


def test_a_whole_run() -> None:
    records = [
        _validation(0, 0.125, 100.0),  # before training: its time is not training's
        _step(1, 3.0, 0.5),
        _step(2, 2.0, 0.25),
        _validation(2, 0.5, 4.0),
        _step(3, 1.5, 0.25),
        _validation(3, 0.75, 8.0),
    ]
    assert summarise(records) == History(3, 13.0, 1.5, 0.125, 0.75)


def test_nothing_logged() -> None:
    assert summarise([]) == History(0, 0, None, None, None)


def test_a_run_without_answers() -> None:
    assert summarise([_validation(0, None, 1.0), _step(1, 2.5, 1.0), _validation(1, None, 1.0)]) == History(
        1, 2.0, 2.5, None, None
    )


def test_a_run_that_was_only_validated_before() -> None:
    assert summarise([_validation(0, 0.25, 3.0)]) == History(0, 0, None, 0.25, None)
