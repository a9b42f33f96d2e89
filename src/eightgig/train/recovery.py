"""What a run does when memory runs out: the same work again, from where it began, with one more lever.

A lever stays on for the rest of the run. Which were switched on, and when, stands in recovery.json: a run that goes on,
or one that is told, switches them at the same points, and so comes to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.core.errors import CheckpointError, DoesNotFit
from eightgig.core.files import write_json
from eightgig.train.journal import Journal
from eightgig.train.plan_check import memory_line
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder
from eightgig.train.run_levers import PassSize, RunLevers, Work, next_levers
from eightgig.train.step_batches import StepBatches

Value = TypeVar("Value")

Moment = Literal["start", "train", "validate", "save", "resume"]

# In the order in which they come within a step: a new run begins at ("start", step 0), one that goes on after step n at
# ("resume", step n).
MOMENTS: tuple[Moment, ...] = ("start", "train", "validate", "save", "resume")

# How it is said by what allocates past PyTorch's allocator for the device: cuBLAS its handles, the driver its code and
# managed memory; and by the allocator of the host.
OTHER_WORDINGS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole, or again from its start.

    Attributes:
        step: the optimizer step that it belongs to, from 1; 0 = before the first.
        moment: when in the step.
        work: what it does.
    """

    step: int
    moment: Moment
    work: Work

    @property
    def position(self) -> tuple[int, int]:
        """Orders the units of a run."""
        return self.step, MOMENTS.index(self.moment)

    def __str__(self) -> str:
        name = {"train": "step", "validate": "the validation after step", "save": "the checkpoint after step"}
        if self.moment in name:
            return f"{name[self.moment]} {self.step}"
        rehearsed = {"train": "the largest micro-batch", "validate": "a validation", "save": "a checkpoint"}
        return f"the rehearsal of {rehearsed[self.work]}"


@dataclass(frozen=True)
class LeverSwitch:
    """Levers as they are from one point of a run on.

    Attributes:
        unit: the first work that is done with them.
        change: what the last of them does, in words.
        levers: all of them.
    """

    unit: Unit
    change: str
    levers: RunLevers

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LeverSwitch:
        """The switch that `asdict` took apart."""
        return cls(Unit(**value["unit"]), value["change"], RunLevers(**value["levers"]))


class Recovery:
    """Does the work of one run, and does it again where memory runs out."""

    def __init__(
        self,
        run: Run,
        batches: StepBatches,
        folder: RunFolder,
        journal: Journal,
        switches: Sequence[LeverSwitch] = (),
        *,
        steps_done: int,
    ) -> None:
        """Switch the levers of `switches`, in their order, when their time comes; those of `steps_done` are logged."""
        self._run, self.batches, self._folder, self._journal = run, batches, folder, journal
        self._switches = list(switches)
        self._levers = RunLevers.of(run.config)
        self._num_logged = len(self._due(Unit(steps_done, "resume", "train"))) if steps_done else 0
        self._had_second_try = False

    def do(
        self,
        unit: Unit,
        attempt: Callable[[], Value],
        *,
        size: Callable[[], PassSize],
        undo: Callable[[], bool] = lambda: True,
    ) -> Value:
        """What `attempt` returns, tried until memory suffices for it.

        Args:
            unit: what it is.
            attempt: does it, from its start.
            size: its largest forward pass; asked for when it failed.
            undo: puts back what a failed attempt changed; False if it can't.

        Raises:
            DoesNotFit: no lever is left, or the attempt can't be taken back.
        """
        if unit.moment not in ("start", "resume"):
            self._switch_to(self._due(unit))
        has_second_try = unit.moment != "train" or not self._had_second_try
        while True:
            try:
                result = attempt()
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self._run.accelerator.num_processes > 1:
                    # The others wait for this one in the middle of a step; they can't be called back.
                    raise self._explained(unit, "one of several processes can't repeat a step alone") from error
                first_line = str(error).partition("\n")[0]
            # Only here, behind the handler, is the traceback gone, and with it the tensors of its frames.
            was_undone = undo()
            clear_device_cache(garbage_collection=True)
            if not was_undone:
                raise self._explained(unit, "the update had begun, and is too large for a copy to go back to")
            self._journal.message(f"out of memory in {unit}: {first_line}")
            if has_second_try:
                has_second_try = False
                # Of all steps one: else each later one might be done twice.
                self._had_second_try |= unit.moment == "train"
                self._journal.message(f"trying {unit} again with all unused memory given back")
            else:
                self._take_next_lever(unit, size())
        self._log(unit)
        return result

    def with_all_known(self) -> None:
        """Switch to the levers that the run will have at its end, as far as it is known."""
        if self._switches:
            self._put_on(self._switches[-1].levers)

    def _due(self, unit: Unit) -> list[LeverSwitch]:
        return [switch for switch in self._switches if switch.unit.position <= unit.position]

    def _switch_to(self, due: Sequence[LeverSwitch]) -> None:
        levers = due[-1].levers if due else RunLevers.of(self._run.config)
        if levers != self._levers:
            self._put_on(levers)

    def _take_next_lever(self, unit: Unit, size: PassSize) -> None:
        known = self._switches[-1].levers if self._switches else self._levers
        following = next_levers(known, unit.work, size, can_tile=self._run.layer_levers.can_tile)
        if following is None:
            raise self._explained(unit, "no lever on its memory is left")
        change, levers = following
        switch = LeverSwitch(unit, change, levers)
        # What was to be switched later is among the levers already.
        self._switches = [*self._due(unit), switch]
        write_json(self._folder.recovery, [asdict(each) for each in self._switches])
        changes = [{"from": str(each.unit), "change": each.change} for each in self._switches]
        self._folder.update_facts(levers_switched_on=changes)
        self._put_on(levers)
        self._journal.message(f"from {unit} on {change}; trying it again")

    def _put_on(self, levers: RunLevers) -> None:
        run, old = self._run, self._levers
        self._levers = levers
        run.layer_levers.put_on(levers.in_config(run.config))
        run.step.compute = replace(run.step.compute, loss_chunk_tokens=levers.loss_chunk_tokens)
        run.samples_at_once = levers.samples_at_once
        if levers.samples_at_once != old.samples_at_once:
            self.batches.split(levers.samples_at_once)

    def _log(self, unit: Unit) -> None:
        """Log what was switched on for `unit`, which now is done."""
        due = self._due(unit)
        for switch in due[self._num_logged :]:
            record = {"kind": "recovery", "step": switch.unit.step, "moment": switch.unit.moment}
            self._journal.recovery({**record, "change": switch.change, "levers": asdict(switch.levers)})
        self._num_logged = max(self._num_logged, len(due))

    def _explained(self, unit: Unit, why: str) -> DoesNotFit:
        found = "\n".join([f"ran out of memory in {unit}, and {why}", *self._circumstances(unit)])
        return DoesNotFit(
            found,
            expected="work that fits the card (or hardware.cap_gib)",
            next_step=self._next_step(),
        )

    def _circumstances(self, unit: Unit) -> Iterator[str]:
        """What was measured, what was in hand, and what was tried."""
        line = memory_line(self._run)
        if line is not None:
            yield f"  {line}"
        if unit.moment == "train":
            largest = max(self.batches.of(unit.step), key=lambda batch: batch.labels.numel())
            yield f"  samples of the largest micro-batch: {', '.join(largest.sample_ids)}"
        tried = "; ".join(switch.change for switch in self._due(unit))
        if tried:
            yield f"  tried: {tried}"

    def _next_step(self) -> str:
        change = "lower data.max_length, data.image_size or training.lora.rank"
        checkpoints = checkpoint_paths(self._folder.checkpoints)
        if not checkpoints:
            return f"close other programs on the GPU, raise hardware.cap_gib, or {change}, and start again"
        return (
            f"close other programs on the GPU or raise hardware.cap_gib, then go on from {checkpoints[-1]} with "
            f"`eightgig train --resume {self._folder.path}`; or {change} and start anew"
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that memory did not suffice, on the device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OTHER_WORDINGS)


def read_switches(folder: RunFolder) -> tuple[LeverSwitch, ...]:
    """The levers that the run in `folder` has switched on so far.

    Raises:
        CheckpointError: recovery.json is damaged.
    """
    if not folder.recovery.is_file():
        return ()
    try:
        values = json.loads(folder.recovery.read_text(encoding="utf-8"))
        return tuple(LeverSwitch.from_json(value) for value in values)
    except (ValueError, KeyError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(
            f"{folder.recovery} is damaged: {error}",
            expected="the levers that the run switched on when memory ran out, as it wrote them",
            next_step="put the file back from a copy, or delete it: when memory runs out, the run finds them again",
        ) from error
