"""The training loop, from top to bottom: rehearse, validate, then step, log, validate and save until the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from accelerate.utils import set_seed

from eightgig.data.batch import MicroBatch
from eightgig.models.adapters import check_gradients
from eightgig.train.journal import Journal
from eightgig.train.non_finite import NumberWatch
from eightgig.train.plan_check import memory_line, spill_line
from eightgig.train.recovery import Recovery, Unit
from eightgig.train.rehearsal import Rehearsal
from eightgig.train.run import Run
from eightgig.train.run_levers import PassSize
from eightgig.train.saving import Saver
from eightgig.train.stopping import RunStopped, StopRequest
from eightgig.train.validation import Validator

NUM_STEPS_MEASURED = 2  # optimizer states appear in the first; the second is what all later ones are like
ETA_SMOOTHING = 0.9  # share of the old estimate kept at each step


class TrainingLoop:
    """Runs the optimizer steps of `run`, until the last or until `stop` is asked for."""

    def __init__(
        self,
        run: Run,
        journal: Journal,
        validator: Validator,
        saver: Saver,
        stop: StopRequest,
        recovery: Recovery,
        rehearsal: Rehearsal,
    ) -> None:
        self.run = run
        self.journal = journal
        self.validator = validator
        self.saver = saver
        self.stop = stop
        self.batches = recovery.batches
        self.recovery = recovery
        self.rehearsal = rehearsal
        self._undo = rehearsal.undo
        self._seconds_per_step: float | None = None
        self._gradients_checked = False
        self._spill_said = False
        self._watch = NumberWatch(run, journal)

    def train(self, *, steps_done: int, is_validated: bool = False) -> None:
        """Do all steps after `steps_done` (0 = a new run).

        `is_validated` says whether the validation that may be due after `steps_done` was done before.

        Raises:
            DoesNotFit: the GPU ran out of memory, and nothing was left to be done about it; or the disk is full.
            EnvironmentProblem: the first gradients are not where they should be.
            RunStopped: `stop` was asked for; the step in hand is finished and saved.
            TrainingDiverged: too many steps in a row had no finite loss and gradient.
        """
        with self.stop.finishing_steps():
            self._train(steps_done, is_validated)
        self.journal.close()

    def _train(self, steps_done: int, is_validated: bool) -> None:
        run = self.run
        self.saver.check_room()
        if run.config.hardware.rehearsal:
            self.rehearsal(steps_done)
            self._stop_if_asked(steps_done)
        if not is_validated and (steps_done == 0 or self._is_validation_due(steps_done)):
            self._validate(steps_done)
            self._stop_if_asked(steps_done)
        for step in range(steps_done + 1, run.num_steps + 1):
            self._step(step)
            if step == steps_done + 1:
                self.saver.check_room()  # the optimizer's states are there now
            self._compare_memory(is_settled=step == steps_done + NUM_STEPS_MEASURED)
            is_best = self._is_validation_due(step) and not self._is_stop_asked() and self._validate(step)
            is_due = step == run.num_steps or _is_due(step, run.config.checkpoints.every_steps)
            is_stopped = self._is_stop_asked()
            if is_best or is_due or is_stopped:
                reason = "lowest validation loss so far" if is_best else "regular" if is_due else "the run is stopped"
                self.save(step, reason=reason)
            if is_stopped:
                raise self.stop.stopped(f"after step {step}")

    def _is_validation_due(self, step: int) -> bool:
        return step == self.run.num_steps or _is_due(step, self.run.config.validation.every_steps)

    def _validate(self, step: int) -> bool:
        """Validate after `step`; whether the loss is the lowest so far. One that is cut short tells nothing."""
        try:
            loss = self.validate(step)
        except RunStopped:
            self.journal.message("the validation was cut short: it is done first when the run goes on")
            return False
        return step > 0 and loss is not None and self.saver.is_best(step, loss)

    def _is_stop_asked(self) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step."""
        return self.run.total_over_processes(int(self.stop.is_asked))[0] > 0

    def _stop_if_asked(self, step: int) -> None:
        if self._is_stop_asked():
            raise self.stop.stopped(f"after step {step}")

    def validate(self, step: int) -> float | None:
        """The validation loss after `step`; None where the run has no validation samples."""
        unit = Unit(step, "validate", "validate")
        return self.recovery.do(unit, lambda: self.validator(step), size=self.run.validation_pass_size)

    def save(self, step: int, *, reason: str) -> None:
        """Write the checkpoint after `step`."""
        unit = Unit(step, "save", "save")
        self.recovery.do(unit, lambda: self.saver.save(step, reason=reason), size=self.run.validation_pass_size)

    def _compare_memory(self, *, is_settled: bool) -> None:
        """Say how the memory so far compares with the plan, once it `is_settled`, and once if it has left the card."""
        line = memory_line(self.run) if is_settled else None
        if line is not None:
            self.journal.message(line)
        spilled = None if self._spill_said else spill_line(self.run)
        if spilled is not None:
            self._spill_said = True
            self.journal.message(spilled)

    def _step(self, step: int) -> None:
        record = self.recovery.do(
            Unit(step, "train", "train"),
            lambda: self._attempt(step),
            size=lambda: PassSize.of(self.batches.of(step)),
            undo=self._undo.restore,
        )
        self.journal.step(record, eta_s=self._eta_s(step, record["step_s"]), steps_planned=self.run.num_steps)
        self._watch.judge(step, self.batches.of(step))

    def _attempt(self, step: int) -> dict[str, Any]:
        """Do `step` and return its record; what it needs is a function of `step`, so that it can be done again."""
        run = self.run
        with run.meter.phase("train"):
            started = time.perf_counter()
            micro_batches = self.batches.of(step)
            data_wait_s = time.perf_counter() - started
            counts = _count(run, micro_batches)
            self._seed(step)
            result = run.step(micro_batches, counts["num_target_tokens"])
            grad_norm = run.step.finish_gradients()
            self._check_gradients_once(grad_norm, counts["num_images"])
            learning_rate = run.step.scheduler.get_last_lr()[0]
            loss = float(result.loss)
            seen = self._watch.look(loss, grad_norm)
            self._undo.keep()
            is_applied = run.step.apply(grad_norm if math.isfinite(loss) else math.nan)
            self._undo.forget()
            step_s = time.perf_counter() - started
        return {
            "kind": "step",
            "step": step,
            "epoch": step / run.order.steps_per_epoch,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "skipped": not is_applied,
            "spike": seen.is_spike,
            **counts,
            "padding_share": 1 - counts["num_tokens"] / counts["num_computed_tokens"],
            "step_s": step_s,
            "data_wait_s": data_wait_s,
            "tokens_per_s": counts["num_tokens"] / step_s,
            "images_per_s": counts["num_images"] / step_s,
            **run.meter.step_fields(),
        }

    def _seed(self, step: int) -> None:
        """Start every generator anew for `step`: a resumed or repeated step draws what it would have drawn."""
        set_seed(self.run.seed_of_step(step))

    def _check_gradients_once(self, grad_norm: float, num_images: int) -> None:
        """Check at the first step that can tell: all gradients finite, and an image in it where the data has any."""
        shows_all = num_images > 0 or not self.run.data.has_images
        if not self._gradients_checked and shows_all and math.isfinite(grad_norm):
            check_gradients(self.run.model)
            self._gradients_checked = True

    def _eta_s(self, step: int, step_s: float) -> float:
        old = self._seconds_per_step
        self._seconds_per_step = step_s if old is None else ETA_SMOOTHING * old + (1 - ETA_SMOOTHING) * step_s
        return self._seconds_per_step * (self.run.num_steps - step)


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def _count(run: Run, micro_batches: list[MicroBatch]) -> Mapping[str, int]:
    """Target tokens, tokens without and with padding, and images of the whole step, over all processes."""
    names = ("num_target_tokens", "num_tokens", "num_computed_tokens", "num_images")
    own = [sum(getattr(batch, name) for batch in micro_batches) for name in names]
    return dict(zip(names, run.total_over_processes(*own), strict=True))
