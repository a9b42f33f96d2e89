"""Validation during a run: the loss over the validation set, and generated answers on a fixed part of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.data.loader import validation_batches
from eightgig.evaluate.generate import Generation, generate_answers
from eightgig.evaluate.loss import validation_loss
from eightgig.evaluate.metrics import METRICS
from eightgig.train.journal import Journal
from eightgig.train.run import Run
from eightgig.train.stopping import StopRequest


class Validator:
    """Validates `run` on demand and logs it. A run of one process that is asked to stop does not finish it."""

    def __init__(self, run: Run, journal: Journal, stop: StopRequest) -> None:
        self._run = run
        self._journal = journal
        self._stop = stop

    def __call__(self, step: int) -> float | None:
        """The validation loss after `step` optimizer steps; None where the run has no validation samples.

        Raises:
            RunStopped: the run was asked to stop meanwhile; nothing is logged.
        """
        run = self._run
        if not run.data.validation:
            return None
        started = time.perf_counter()
        # Processes that wait for each other can only stop together, where the loop asks all of them.
        cut_short = self._stop.at_once() if run.accelerator.num_processes == 1 else contextlib.nullcontext()
        with run.meter.phase("validate"), cut_short:
            loss = self._loss()
            # One process suffices for a few answers; the others wait for it below.
            generations = self._generate() if run.accelerator.is_main_process else []
        run.accelerator.wait_for_everyone()
        record = {
            "kind": "validation",
            "step": step,
            "loss": loss,
            **_mean_metrics(generations),
            "num_generated": len(generations),
            "validation_s": time.perf_counter() - started,
        }
        self._journal.validation(record, [_row(step, generation) for generation in generations])
        return loss

    def _loss(self) -> float:
        run = self._run
        batches = validation_batches(
            run.encoder,
            run.data.validation,
            batch_size=run.validation_batch_size,
            process_index=run.accelerator.process_index,
            num_processes=run.accelerator.num_processes,
        )
        return validation_loss(
            run.model, run.loaded.spec.family, batches, run.step.compute, run.step.sum_over_processes
        )

    def _generate(self) -> list[Generation]:
        run = self._run
        return generate_answers(
            run.model,
            run.encoder,
            run.generation_samples,
            run.step.compute,
            batch_size=run.validation_batch_size,
            max_new_tokens=run.config.validation.max_new_tokens,
        )


def _mean_metrics(generations: Sequence[Generation]) -> dict[str, float | None]:
    """The mean of every metric over `generations`, None where there are none."""
    if not generations:
        return dict.fromkeys(METRICS)
    return {
        name: sum(metric(generation.answer, generation.expected) for generation in generations) / len(generations)
        for name, metric in METRICS.items()
    }


def _row(step: int, generation: Generation) -> Mapping[str, Any]:
    return {
        "step": step,
        "sample_id": generation.sample_id,
        "images": list(generation.images),
        "question": generation.question,
        "expected": generation.expected,
        "answer": generation.answer,
        "correct": generation.correct,
    }
