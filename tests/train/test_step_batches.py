"""The micro-batches of a step, as often as it is tried, and from a loader that failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from eightgig.data.order import StepOrder
from eightgig.train.step_batches import StepBatches

ORDER = StepOrder(23, batch_size=4, accumulation=2, seed=3)
NUM_STEPS = 5


class Loader:
    """Gives indices in place of batches; fails at the steps (0-based) of `failing`, each once."""

    def __init__(self, *failing: int) -> None:
        self.opened: list[range] = []
        self._failing = set(failing)

    def __call__(self, order: Any, steps: range) -> Iterator[Any]:
        self.opened.append(steps)
        for step in steps:
            if step in self._failing:
                self._failing.remove(step)
                raise RuntimeError("full")
            yield order.micro_batches(step)


def test_a_step_at_hand_is_not_asked_for_again() -> None:
    loader = Loader()
    batches = StepBatches(ORDER, NUM_STEPS, loader)
    found = [(batches.of(step), batches.of(step)) for step in (3, 4, 5)]
    assert found == [(ORDER.micro_batches(step),) * 2 for step in (2, 3, 4)]
    assert loader.opened == [range(2, 5)]


def test_a_split_begins_with_the_step_at_hand() -> None:
    loader = Loader()
    batches = StepBatches(ORDER, NUM_STEPS, loader)
    first: Any = batches.of(1)
    whole: Any = batches.of(2)
    batches.split(3)
    split: Any = batches.of(2)
    assert split == [part for batch in whole for part in (batch[:3], batch[3:])]
    batches.split(None)
    assert batches.of(2) == whole
    assert first != whole
    assert loader.opened == [range(5), range(1, 5), range(1, 5)]


def test_a_loader_that_failed_is_opened_anew() -> None:
    loader = Loader(1)
    batches = StepBatches(ORDER, NUM_STEPS, loader)
    batches.of(1)
    with pytest.raises(RuntimeError, match="full"):
        batches.of(2)
    assert batches.of(2) == ORDER.micro_batches(1)
    assert loader.opened == [range(5), range(1, 5)]
