"""The optimizer steps of a simulated run; what is known to repeat is written down again and not simulated again.

A run's second pass forward and backward allocates what its first did, workspaces aside: nothing but gradients is left
of either. An update (clipping and the optimizer) depends on the gradients' shapes and the optimizer's settings, so
that it is simulated once for all runs that have them in common. Where either does not hold, as the blocks that stay or
go tell, all is simulated. The trace is the same either way, event by event (tests/plan/test_simulated_steps.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eightgig.data.batch import MicroBatch
from eightgig.plan.categories import GRADIENTS, OPTIMIZER, OTHER
from eightgig.plan.layer_recording import TensorShape, make_tensor, shape_of
from eightgig.plan.layer_signature import Unlike
from eightgig.plan.op_costs import OpCost
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import MemoryTrace, TracePart
from eightgig.step.step import TrainingStep

NUM_STEPS = 2  # optimizer states appear in the first; the second is what all later ones are like


@dataclass(frozen=True)
class Update:
    """One update: its events, the gradients being the blocks from outside, and what it costs."""

    part: TracePart
    costs: Counter[OpCost]


@dataclass(frozen=True)
class _Passes:
    """All micro-batches of a step, forward and backward.

    Attributes:
        costs: of all of them.
        part: the events, None where they may not come again.
        gradients: of each trainable parameter, in blocks of `part`.
    """

    costs: Counter[OpCost]
    part: TracePart | None
    gradients: Sequence[TensorShape] = ()


class UpdateMemo:
    """The updates of runs on one model, by optimizer settings and gradients: those of each step."""

    def __init__(self) -> None:
        self.known: dict[Any, list[Update]] = {}


class SimulatedSteps:
    """The steps of one run.

    Args:
        step: of the run.
        recorder: writes down what is allocated.
        trace: where to.
        repeats: whether a second step's passes do what the first's do as far as its memory is concerned.
        updates: what is known of updates of runs with other settings; None: nothing, or the optimizer's states are
            needed afterwards.
        settings: those of the run that updates depend on.
    """

    def __init__(
        self,
        step: TrainingStep,
        recorder: Recorder,
        trace: MemoryTrace,
        *,
        repeats: bool,
        updates: UpdateMemo | None,
        settings: str,
    ) -> None:
        self._step = step
        self._parameters = list(step.trainable.values())
        self._recorder = recorder
        self._trace = trace
        self._repeats = repeats
        self._memo = updates
        self._settings = settings

    def run(
        self, micro_batches: Sequence[MicroBatch], num_target_tokens: int
    ) -> tuple[Counter[OpCost], Counter[OpCost]]:
        """Simulate all steps, each of `micro_batches`; what the passes and the update of the last one cost."""
        passes, blocks, known = _Passes(Counter(), None), list[int](), list[Update]()
        updates: list[Update | None] = []
        for index in range(NUM_STEPS):
            self._trace.mark("train")
            if passes.part is None:
                passes = self._passes(micro_batches, num_target_tokens)
                known = self._known(passes) if index == 0 else known
                blocks = self._take_gradients() if known else []
            else:
                first = self._trace.extend(passes.part)
                blocks = [first + shape.block for shape in passes.gradients]
                if not known:
                    self._make_gradients(passes, blocks)
            if known:
                self._trace.extend(known[index].part, blocks)
                update = known[index].costs
            else:
                update = Counter[OpCost]()
                updates.append(self._update(update))
        if updates:
            self._remember(passes, updates)
        return passes.costs, update

    def _known(self, passes: _Passes) -> list[Update]:
        """The updates of each step, if they are known of a run before."""
        return [] if self._memo is None else self._memo.known.get(self._key(passes), [])

    def _remember(self, passes: _Passes, updates: Sequence[Update | None]) -> None:
        whole = [update for update in updates if update is not None]
        if self._memo is not None and passes.gradients and len(whole) == len(updates):
            self._memo.known[self._key(passes)] = whole

    def _key(self, passes: _Passes) -> tuple[Any, ...]:
        return (self._settings, tuple(map(_like, passes.gradients)))

    def _passes(self, micro_batches: Sequence[MicroBatch], num_target_tokens: int) -> _Passes:
        end, costs = self._trace.end, Counter[OpCost]()
        self._recorder.costs = costs
        self._step(micro_batches, num_target_tokens)
        self._recorder.costs = None
        self._recorder.category = OTHER
        self._recorder.label((parameter.grad for parameter in self._parameters), GRADIENTS)
        try:
            shapes = [shape_of(self._recorder, parameter.grad) for parameter in self._parameters]
        except Unlike:
            return _Passes(costs, None)
        part = self._trace.part_since(end) if self._repeats else None
        places = dict(zip(sorted({shape.block for shape in shapes}), part.live_blocks if part else (), strict=False))
        if part is None or len(places) != len(shapes) or len(places) != len(part.live_blocks):
            return _Passes(costs, None, shapes)
        return _Passes(costs, part, [replace(shape, block=places[shape.block]) for shape in shapes])

    def _update(self, costs: Counter[OpCost]) -> Update | None:
        """Simulate one; None where it may be another one in another run."""
        outside = self._gradient_blocks()
        end = self._trace.end
        self._recorder.costs = costs
        self._step.apply(self._step.finish_gradients())
        self._recorder.costs = None
        states = self._states()
        self._recorder.label(states, OPTIMIZER)
        if self._memo is None:
            return None
        part = self._trace.part_since(end, outside)
        if part is None or len(part.categories) != self._trace.end[1] - end[1]:
            return None
        staying = {self._recorder.block_of(state) for state in states}
        return Update(part, costs) if {end[1] + block for block in part.live_blocks} <= staying else None

    def _gradient_blocks(self) -> list[int]:
        blocks = (
            self._recorder.block_of(parameter.grad) for parameter in self._parameters if parameter.grad is not None
        )
        return [block for block in blocks if block is not None]

    def _states(self) -> list[torch.Tensor]:
        states = (value for state in self._step.optimizer.state.values() for value in state.values())
        return [state for state in states if isinstance(state, torch.Tensor)]

    def _make_gradients(self, passes: _Passes, blocks: Sequence[int]) -> None:
        """Gradients in `blocks`, as if the passes had made them."""
        for parameter, shape, block in zip(self._parameters, passes.gradients, blocks, strict=True):
            with self._recorder.paused():
                parameter.grad = make_tensor(shape)
            self._recorder.enter(parameter.grad, block)

    def _take_gradients(self) -> list[int]:
        """Take the gradients from the parameters; their blocks, which are to be freed."""
        blocks = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            block = self._recorder.take_over(parameter.grad)
            assert block is not None
            blocks.append(block)
            parameter.grad = None
        return blocks


def _like(shape: TensorShape) -> tuple[Any, ...]:
    return (shape.storage_bytes, shape.size, shape.stride, shape.offset, shape.dtype)
