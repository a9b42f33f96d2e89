"""What a step without finite numbers was made of, written for somebody who wants to find out why."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from eightgig.core.files import whole_folder, write_json
from eightgig.data.batch import MicroBatch
from eightgig.data.sample import ImagePart, Sample, TextPart
from eightgig.step.step import batch_loss_sum
from eightgig.train.run import Run

BATCH_JSON, INPUTS = "batch.json", "inputs.safetensors"
MAX_NAMES = 100
MAX_TEXT_CHARACTERS = 10_000


@dataclass(frozen=True)
class NonFiniteStep:
    """The numbers of the step that is written down."""

    step: int
    loss: float
    grad_norm: float
    non_finite_gradients: Sequence[str]


@dataclass(frozen=True)
class DumpedBatch:
    """What was written.

    Attributes:
        folder: holds `batch.json` and, unless the process had no micro-batch, `inputs.safetensors`.
        num_micro_batches: of this process.
        num_non_finite_losses: how many of them had a loss that is not finite.
        blamed_sample_ids: the samples of these.
    """

    folder: Path
    num_micro_batches: int
    num_non_finite_losses: int
    blamed_sample_ids: tuple[str, ...]


def write_dump(run: Run, below: Path, numbers: NonFiniteStep, micro_batches: Sequence[MicroBatch]) -> DumpedBatch:
    """Write this process's part of a step that moved no weight: its samples, their losses one by one, and the inputs.

    Losses are computed anew, forward alone, with the weights that the step began with and its first seed. The inputs
    are those of the first micro-batch without a finite loss, or else of the first one.
    """
    losses = _losses(run, numbers.step, micro_batches)
    is_bad = [not math.isfinite(loss) for loss in losses]
    name = f"step-{numbers.step:08d}"
    if run.accelerator.num_processes > 1:
        name = f"{name}-process-{run.accelerator.process_index}"
    scaler = run.step.scaler
    shown_at = is_bad.index(True) if any(is_bad) else 0
    described = [
        {
            "loss": loss,
            "shapes": {key: list(value.shape) for key, value in batch.model_inputs.items()},
            "num_target_tokens": batch.num_target_tokens,
            "samples": [_described(sample) for sample in samples],
        }
        for batch, loss, samples in zip(micro_batches, losses, _samples(run, numbers.step, micro_batches), strict=True)
    ]
    record = {
        "step": numbers.step,
        "loss": numbers.loss,
        "grad_norm": numbers.grad_norm,
        "loss_scale": scaler.get_scale() if scaler is not None else None,
        "num_non_finite_gradients": len(numbers.non_finite_gradients),
        "non_finite_gradients": list(numbers.non_finite_gradients[:MAX_NAMES]),
        "micro_batches": described,
        "inputs_of_micro_batch": shown_at,
    }
    with whole_folder(below / name) as folder:
        write_json(folder / BATCH_JSON, _with_words(record))
        if micro_batches:
            shown = micro_batches[shown_at]
            tensors = {**shown.model_inputs, "labels": shown.labels}
            save_file({key: value.contiguous() for key, value in tensors.items()}, folder / INPUTS)
    blamed = (batch.sample_ids for batch, bad in zip(micro_batches, is_bad, strict=True) if bad)
    return DumpedBatch(below / name, len(micro_batches), sum(is_bad), tuple(itertools.chain.from_iterable(blamed)))


def _losses(run: Run, step: int, micro_batches: Sequence[MicroBatch]) -> list[float]:
    """The mean loss of each micro-batch."""
    compute, family = run.step.compute, run.loaded.spec.family
    set_seed(run.seed_of_step(step))
    with torch.no_grad():
        return [
            float(batch_loss_sum(run.model, family, batch, compute)) / max(batch.num_target_tokens, 1)
            for batch in micro_batches
        ]


def _samples(run: Run, step: int, micro_batches: Sequence[MicroBatch]) -> Iterator[list[Sample]]:
    """The samples of each micro-batch, by the order that they were taken in."""
    own = run.order.micro_batches(step - 1)[run.accelerator.process_index :: run.accelerator.num_processes]
    indices = itertools.chain.from_iterable(own)
    for batch in micro_batches:
        yield [run.data.train[index] for index in itertools.islice(indices, len(batch.sample_ids))]


def _described(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": sample.sample_id,
        "source": str(sample.source),
        "messages": [
            {
                "role": message.role,
                "parts": [
                    part.text[:MAX_TEXT_CHARACTERS] if isinstance(part, TextPart) else _described_image(part)
                    for part in message.parts
                ],
            }
            for message in sample.messages
        ],
    }


def _described_image(part: ImagePart) -> dict[str, str | None]:
    if part.path is None:
        return {"image": str(part), "sha256": hashlib.sha256(part.data or b"").hexdigest()}
    if not part.path.is_file():  # kept features stand in for pixels: the file may have gone
        return {"image": str(part), "sha256": None}
    with part.path.open("rb") as stream:
        return {"image": str(part), "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _with_words(value: Any) -> Any:
    """`value` with NaN and infinities as texts: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _with_words(item) for key, item in value.items()}
    return [_with_words(item) for item in value] if isinstance(value, list) else value
