"""Which samples each optimizer step sees: a pure function of the step, so that resuming needs no replay."""

from __future__ import annotations

from typing import Protocol

import torch

from eightgig.config import Batching
from eightgig.core.seeds import derive_seed
from eightgig.data.grouping import Grouping


class MicroBatchOrder(Protocol):
    """Tells the samples of each optimizer step."""

    @property
    def is_packed(self) -> bool:
        """Whether the samples of a micro-batch share one row."""

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of each micro-batch of optimizer step `step` (0-based)."""


class StepOrder:
    """The order of `num_samples` samples over all optimizer steps.

    Each epoch is a permutation of its own, seeded by run seed and epoch. Nothing is dropped: the last step of an epoch
    holds what is left, and may have fewer and smaller micro-batches. `grouping` says which samples of a step go
    together; by default each `batch_size` in their order.
    """

    def __init__(
        self, num_samples: int, batch_size: int, accumulation: int, seed: int, grouping: Grouping | None = None
    ) -> None:
        if min(num_samples, batch_size, accumulation) < 1:
            raise ValueError(f"all must be at least 1: {num_samples=}, {batch_size=}, {accumulation=}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.grouping = Grouping(Batching.IN_ORDER, batch_size) if grouping is None else grouping
        self._epoch_in_hand: tuple[int, list[int]] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the samples of a micro-batch share one row."""
        return self.grouping.is_packed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every sample once."""
        return -(-self.num_samples // (self.batch_size * self.accumulation))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of each micro-batch of optimizer step `step` (0-based)."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        samples_per_step = self.batch_size * self.accumulation
        first = step_in_epoch * samples_per_step
        return self.grouping(self._permutation(epoch)[first : first + samples_per_step])

    def _permutation(self, epoch: int) -> list[int]:
        if self._epoch_in_hand is None or self._epoch_in_hand[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "sample order", epoch))
            self._epoch_in_hand = (epoch, torch.randperm(self.num_samples, generator=generator).tolist())
        return self._epoch_in_hand[1]


class SplitOrder:
    """The steps of `order`, with the same samples in the same order, at most `samples_at_once` in a micro-batch."""

    def __init__(self, order: MicroBatchOrder, samples_at_once: int) -> None:
        if samples_at_once < 1:
            raise ValueError(f"must be at least 1: {samples_at_once=}")
        self._order = order
        self._samples_at_once = samples_at_once

    @property
    def is_packed(self) -> bool:
        """Whether the samples of a micro-batch share one row."""
        return self._order.is_packed

    def micro_batches(self, step: int) -> list[list[int]]:
        """Sample indices of each micro-batch of optimizer step `step` (0-based)."""
        most = self._samples_at_once
        return [
            indices[start : start + most]
            for indices in self._order.micro_batches(step)
            for start in range(0, len(indices), most)
        ]
