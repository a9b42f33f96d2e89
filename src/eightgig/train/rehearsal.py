"""What would go wrong in the night goes wrong before the first step: the largest micro-batch, a validation, a save.

The passes are those that the plan simulates: a pass that makes the gradients and an update that makes the optimizer's
states; then a pass beside both. All of it is taken back: weights, states and schedule are bit for bit what they were,
and so is what PyTorch has reserved. Random numbers need no care, since each step starts its generators anew.
"""

from __future__ import annotations

import time

from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache

from eightgig.core.seeds import derive_seed
from eightgig.data.batch import MicroBatch
from eightgig.data.loader import validation_batches
from eightgig.data.sample import Sample
from eightgig.evaluate.generate import generate_answers
from eightgig.evaluate.loss import validation_loss
from eightgig.train.journal import Journal
from eightgig.train.largest_batch import largest_micro_batch
from eightgig.train.recovery import Moment, Recovery, Unit
from eightgig.train.run import Run
from eightgig.train.run_levers import PassSize
from eightgig.train.saving import Saver
from eightgig.train.step_batches import OpenLoader, StepBatches
from eightgig.train.step_undo import StepUndo


class _OneMicroBatch:
    """An order whose only step has one micro-batch, for each of `num_processes`."""

    def __init__(self, indices: list[int], num_processes: int, *, is_packed: bool) -> None:
        self._step = [indices] * num_processes
        self.is_packed = is_packed

    def micro_batches(self, step: int) -> list[list[int]]:
        """The one micro-batch, for each process."""
        return self._step


class Rehearsal:
    """Does what takes the most memory, once, before the first step of a run or of its continuation.

    Attributes:
        undo: takes it back; the steps use the same, for the memory on the host that it holds.
    """

    def __init__(
        self,
        run: Run,
        batches: StepBatches,
        open_loader: OpenLoader,
        saver: Saver,
        journal: Journal,
        recovery: Recovery,
    ) -> None:
        """`open_loader` makes the one micro-batch as `batches` makes all."""
        self._run, self._batches, self._open_loader = run, batches, open_loader
        self._saver, self._journal, self._recovery = saver, journal, recovery
        self.undo = StepUndo(run.step)
        self._updates = False

    def __call__(self, steps_done: int) -> None:
        """Rehearse the steps after `steps_done` (0 = a new run).

        Raises:
            DoesNotFit: memory or disk does not suffice, whatever lever is on.
        """
        run = self._run
        remaining = range(steps_done, run.num_steps)
        if not remaining:
            return
        started = time.perf_counter()
        self._journal.message("rehearsing the largest micro-batch, a validation and a checkpoint")
        moment: Moment = "resume" if steps_done else "start"
        self._recovery.with_all_known()
        self._keep()
        try:
            with run.meter.phase("rehearse"):
                self._recovery.do(
                    Unit(steps_done, moment, "train"),
                    lambda: self._train(remaining),
                    size=lambda: PassSize.of([self._batch(remaining)]),
                    undo=self._put_back,
                )
                validation, save = Unit(steps_done, moment, "validate"), Unit(steps_done, moment, "save")
                if run.data.validation:
                    self._recovery.do(validation, lambda: self._validate(remaining), size=run.validation_pass_size)
                self._recovery.do(save, self._saver.rehearse, size=run.validation_pass_size)
        finally:
            self.undo.restore()
        if run.meter.is_cuda:  # what comes now finds the card as the plan does
            clear_device_cache(garbage_collection=True)
        seconds = time.perf_counter() - started
        self._journal.message(f"rehearsed in {seconds:.1f} s: memory and disk suffice")

    def _train(self, remaining: range) -> None:
        """A first pass and an update, then a pass as all later ones are."""
        step = self._run.step
        batch = self._batch(remaining)
        set_seed(derive_seed(self._run.config.seed, "rehearsal") % 2**32)  # numpy takes no more bits
        step([batch], batch.num_target_tokens)
        if self._updates:
            for weight in step.trainable.values():
                if weight.grad is not None:
                    weight.grad.zero_()  # for the states' memory alone: the next pass shall have weights as good
            step.optimizer.step()
        if len(self._batches.order.micro_batches(remaining.start)) == 1:  # gradients are never there before a pass
            step.optimizer.zero_grad(set_to_none=True)
        step([batch], batch.num_target_tokens)
        step.optimizer.zero_grad(set_to_none=True)

    def _validate(self, remaining: range) -> None:
        """The loss over a batch, and the first token of the answers to its prompts, as the plan has them."""
        run = self._run
        samples = self._samples(remaining)[: run.validation_batch_size]
        batches = validation_batches(run.encoder, samples, batch_size=len(samples))
        validation_loss(run.model, run.loaded.spec.family, batches, run.step.compute)
        asked = samples[: run.config.validation.num_generated]
        generate_answers(
            run.model, run.encoder, asked, run.step.compute, batch_size=run.validation_batch_size, max_new_tokens=1
        )

    def _largest(self, remaining: range) -> list[int]:
        run = self._run
        return largest_micro_batch(run.config, run.loaded.spec, run.data, self._batches.order, remaining)

    def _samples(self, remaining: range) -> list[Sample]:
        return [self._run.data.train[index] for index in self._largest(remaining)]

    def _batch(self, remaining: range) -> MicroBatch:
        order = _OneMicroBatch(
            self._largest(remaining), self._run.accelerator.num_processes, is_packed=self._batches.order.is_packed
        )
        (batch,) = next(self._open_loader(order, range(1)))
        return batch

    def _keep(self) -> None:
        """Keep what an update changes; where it is too much, or the states' memory would never be freed, do none."""
        is_kept = self.undo.keep()
        if not is_kept:
            self.undo.forget()
        # bitsandbytes holds on to pages for good (GlobalPageManager), and they are no memory of the card anyway.
        self._updates = is_kept and not getattr(self._run.step.optimizer, "is_paged", False)

    def _put_back(self) -> bool:
        self.undo.restore()
        self._keep()
        return True
