"""The micro-batches of one optimizer step after another, of the same step as often as it is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eightgig.data.batch import MicroBatch
from eightgig.data.order import MicroBatchOrder, SplitOrder

OpenLoader = Callable[[MicroBatchOrder, range], Iterator[list[MicroBatch]]]
"""Gives the micro-batches of each of some steps (0-based) of an order."""


class StepBatches:
    """Asks a loader for each step's micro-batches, and keeps those of the step at hand."""

    def __init__(self, order: MicroBatchOrder, num_steps: int, open_loader: OpenLoader) -> None:
        self._whole = self._order = order
        self._num_steps = num_steps
        self._open_loader = open_loader
        self._coming: Iterator[list[MicroBatch]] | None = None
        self._at_hand: tuple[int, list[MicroBatch]] | None = None

    @property
    def order(self) -> MicroBatchOrder:
        """Which samples go through the model together."""
        return self._order

    def of(self, step: int) -> list[MicroBatch]:
        """Micro-batches of optimizer step `step` (from 1) for this process; steps are asked for one after another."""
        if self._at_hand is not None and self._at_hand[0] == step:
            return self._at_hand[1]
        self._at_hand = None
        coming = self._coming or self._open_loader(self._order, range(step - 1, self._num_steps))
        self._coming = None  # where it fails, it is of no more use
        micro_batches = next(coming)
        self._coming, self._at_hand = coming, (step, micro_batches)
        return micro_batches

    def split(self, samples_at_once: int | None) -> None:
        """Have at most so many samples in a micro-batch, from the next that is asked for on; None: as in the order."""
        self._order = self._whole if samples_at_once is None else SplitOrder(self._whole, samples_at_once)
        self._coming = self._at_hand = None
