"""Losses and gradients that are no finite numbers: skipped, written down, and the end of the run if they stay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.core.errors import TrainingDiverged
from eightgig.data.batch import MicroBatch
from eightgig.train.journal import Journal
from eightgig.train.non_finite_dump import DumpedBatch, NonFiniteStep, write_dump
from eightgig.train.run import Run
from eightgig.train.spikes import SpikeDetector

MAX_DUMPS = 10  # a run that skips more is not told better by more of them
SMALLEST_LOSS_SCALE = 1.0  # below it, scaling makes gradients smaller than they are, and an overflow is the model's own


@dataclass(frozen=True)
class SeenNumbers:
    """The numbers of one step, looked at before it is applied.

    Attributes:
        is_spike: the gradient norm stands out from those before.
        is_overflow: gradients scaled for fp16 overflowed, as they do until the scaler has found its scale.
        non_finite_gradients: names of the parameters whose gradient holds NaN or infinity; of a finite norm none.
    """

    loss: float
    grad_norm: float
    is_spike: bool
    is_overflow: bool
    non_finite_gradients: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """Whether there is something to learn from."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class NumberWatch:
    """Looks at each step's loss and gradient norm (the same in every process), and acts on what it saw."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self._run = run
        self._journal = journal
        self._spikes = SpikeDetector()
        self._spike_steps: list[int] = []
        self._num_in_a_row = 0
        self._blamed: Counter[str] = Counter()  # samples in micro-batches whose loss was not finite
        self._folders: list[Path] = []
        self._usual_norm: float | None = None
        self._seen: SeenNumbers | None = None

    def look(self, loss: float, grad_norm: float) -> SeenNumbers:
        """What the step's numbers are; call it between `finish_gradients` and `apply`.

        A step that is begun anew may be looked at again: only `judge` counts it.
        """
        step = self._run.step
        self._usual_norm = self._spikes.usual_norm
        is_spike = is_overflow = False
        names: tuple[str, ...] = ()
        if math.isfinite(grad_norm):
            is_spike = self._spikes.is_spike(grad_norm)
        else:
            is_overflow = (
                step.scaler is not None and math.isfinite(loss) and step.scaler.get_scale() > SMALLEST_LOSS_SCALE
            )
            names = tuple(
                name
                for name, parameter in step.trainable.items()
                if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
            )
        self._seen = SeenNumbers(loss, grad_norm, is_spike, is_overflow, names)
        return self._seen

    def judge(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Say and write down what stands out about what was looked at last; call it when the step is done and logged.

        Raises:
            TrainingDiverged: this is the last of `training.max_skipped_steps` steps in a row without finite numbers.
        """
        seen = self._seen
        assert seen is not None
        if math.isfinite(seen.grad_norm):
            self._spikes.remember(seen.grad_norm)
        if seen.is_finite:
            self._num_in_a_row = 0
            self._blamed.clear()
            if seen.is_spike:
                self._tell_spike(step, seen, micro_batches)
            return
        if seen.is_overflow:
            return
        self._num_in_a_row += 1
        where = self._dump(step, seen, micro_batches)
        what = "the loss" if not math.isfinite(seen.loss) else "the gradient"
        self._journal.message(f"step {step} is skipped: {what} is not a finite number{where}")
        if self._num_in_a_row >= self._run.config.training.max_skipped_steps:
            raise self._diverged(step)

    def _tell_spike(self, step: int, seen: SeenNumbers, micro_batches: Sequence[MicroBatch]) -> None:
        assert self._usual_norm is not None
        self._spike_steps.append(step)
        ids = [sample_id for batch in micro_batches for sample_id in batch.sample_ids]
        more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
        self._journal.message(
            f"step {step}: the gradient norm {seen.grad_norm:.3g} is {seen.grad_norm / self._usual_norm:.1f} times the "
            f"usual {self._usual_norm:.3g}; its samples were {', '.join(ids[:4])}{more}"
        )

    def _dump(self, step: int, seen: SeenNumbers, micro_batches: Sequence[MicroBatch]) -> str:
        """Write the step's batch to the run's folder; says where, or nothing once there are enough of them."""
        if len(self._folders) >= MAX_DUMPS:
            return ""
        numbers = NonFiniteStep(step, seen.loss, seen.grad_norm, seen.non_finite_gradients)
        dumped = write_dump(self._run, self._journal.folder.non_finite, numbers, micro_batches)
        self._folders.append(dumped.folder)
        self._blame(dumped)
        return f"; its batch is in {dumped.folder}"

    def _blame(self, dumped: DumpedBatch) -> None:
        if dumped.num_non_finite_losses < dumped.num_micro_batches:  # else it is not the samples' doing
            self._blamed.update(set(dumped.blamed_sample_ids))

    def _diverged(self, step: int) -> TrainingDiverged:
        run, count = self._run, self._num_in_a_row
        causes = "".join(f"\n  - {cause}" for cause in self._likely_causes())
        saved = checkpoint_paths(self._journal.folder.checkpoints)
        kept = f"{max(saved)}, whose adapter/ loads as it is" if saved else "none: no checkpoint was due yet"
        in_a_row = f"{count} steps in a row" if count > 1 else "a step"
        return TrainingDiverged(
            f"no finite loss and gradient in {in_a_row}, up to step {step}; none of them was learnt from. "
            f"Likely causes:{causes}",
            expected=f"fewer than training.max_skipped_steps = {run.config.training.max_skipped_steps} such steps in "
            f"a row; the last good checkpoint is {kept}",
            next_step=f"look at the batches in {self._journal.folder.non_finite}, change what is likeliest above, and "
            "start a new run",
        )

    def _likely_causes(self) -> list[str]:
        """What may be behind it, the likeliest first."""
        run = self._run
        causes = []
        damaged = [name for name, value in run.trainable.items() if not bool(torch.isfinite(value).all())]
        if damaged:
            causes.append(f"trained weights hold NaN or infinity, among them {damaged[0]}: go on from an earlier state")
        compute = run.step.compute
        if torch.float16 in (compute.autocast_dtype, compute.input_dtype):
            causes.append(
                "fp16 holds nothing above 65,504, and the model exceeds it: set hardware.mixed_precision to bf16"
            )
        always = [name for name, times in self._blamed.items() if times == self._num_in_a_row]
        if always:
            causes.append(f"a bad sample: {', '.join(sorted(always)[:4])} was in every one of these steps")
        elif self._blamed:
            names = ", ".join(name for name, _ in self._blamed.most_common(4))
            causes.append(f"bad samples: some micro-batches had a loss that is not finite, those of {names}")
        rate = f"the learning rate {run.config.training.learning_rate:g} is too high"
        if self._spike_steps:
            last = ", ".join(map(str, self._spike_steps[-3:]))
            causes.append(f"{rate}: the gradient norm jumped before, last in step {last}; try a third of it")
        else:
            causes.append(f"{rate}; try a third of it")
        return causes
