"""Micro-batches, decoded and encoded by worker processes, from any optimizer step on."""

from __future__ import annotations

import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from eightgig.core.errors import DataError, EnvironmentProblem
from eightgig.data.batch import EncodedSample, MicroBatch
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.data.order import MicroBatchOrder
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import Sample
from eightgig.registry.facts import ImageLayout

# How torch's DataLoader words it, by whether it finds the worker gone or its signal handler is told so.
_WORKER_ENDED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


@dataclass(frozen=True)
class WorkerSettings:
    """How micro-batches are made.

    Attributes:
        num_workers: worker processes; 0 decodes in the training process itself.
        start_method: "fork", "spawn", "forkserver", or "auto" (fork on Linux, where it is quickest, else spawn).
        pin_memory: whether batches lie in page-locked memory, for copies to a GPU that overlap with its work.
    """

    num_workers: int = 0
    start_method: str = "auto"
    pin_memory: bool = False


class StepLoader:
    """The micro-batches of the optimizer steps in `steps`, one list a step.

    Starting late costs nothing: what was seen before is neither decoded nor counted through, for the order is a
    function of the step. Workers are handed the samples of one micro-batch at a time, so that the data set itself
    is never copied to them, and run at most two micro-batches ahead each.

    Args:
        samples: what `order` numbers.
        encoder: makes tensors of a sample; each worker has a copy.
        order: which samples a step sees.
        steps: 0-based optimizer steps, e.g. `range(first_step, last_step)`.
        workers: how many processes, how started.
        process_index: of `num_processes` training processes, which this is; it gets every `num_processes`-th
            micro-batch of a step, beginning with `process_index`. In an epoch's last step that may be none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        order: MicroBatchOrder,
        *,
        steps: range,
        workers: WorkerSettings = WorkerSettings(),
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self._samples = samples
        self._encoder = encoder
        self._order = order
        self._steps = steps
        self._workers = workers
        self._process_index = process_index
        self._num_processes = num_processes

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield each step's micro-batches.

        Raises:
            DataError: a sample that was good before can't be read any more, e.g. because its image has gone.
            EnvironmentProblem: the system ended a worker.
        """
        batches = iter(self._data_loader())
        for step in self._steps:
            yield [_next_batch(batches) for _ in self._share(step)]

    def _share(self, step: int) -> list[list[int]]:
        """The micro-batches of `step` that this process gets, as sample indices."""
        return self._order.micro_batches(step)[self._process_index :: self._num_processes]

    def _data_loader(self) -> DataLoader[EncodedSample]:
        num_workers = self._workers.num_workers
        return DataLoader(
            _EncodedSamples(self._encoder),
            batch_sampler=_SampleLists(self),  # samples themselves, not indices: see the class's text
            collate_fn=partial(
                _collate_or_failure, pad_token_id=self._encoder.pad_token_id, layout=self._encoder.image_layout
            ),
            num_workers=num_workers,
            multiprocessing_context=_start_context(self._workers.start_method) if num_workers else None,
            pin_memory=self._workers.pin_memory,
            # Its own: torch draws the workers' seed, and from the global one that would shift a resumed run's dropout.
            generator=torch.Generator(),
        )

    def sample_lists(self) -> Iterator[list[Sample]]:
        """The samples of each micro-batch to come, in order."""
        for step in self._steps:
            for indices in self._share(step):
                yield [self._samples[index] for index in indices]


def validation_batches(
    encoder: Encoder, samples: Sequence[Sample], *, batch_size: int, process_index: int = 0, num_processes: int = 1
) -> Iterator[MicroBatch]:
    """`samples` in their order as batches, every `num_processes`-th beginning with `process_index`; decoded in place.

    Raises:
        DataError: a sample that was good before can't be read any more.
    """
    for start in range(process_index * batch_size, len(samples), num_processes * batch_size):
        items = [_encoded(encoder, sample) for sample in samples[start : start + batch_size]]
        yield _batch_or_raise(_collate_or_failure(items, encoder.pad_token_id, encoder.image_layout))


@dataclass(frozen=True)
class _Failure:
    """Why a sample gave no tensors; sent as a value, since torch rebuilds exceptions of workers from one text."""

    where: str
    sample_id: str
    reason: str


class _SampleLists:
    """torch's batch sampler, handing over samples themselves instead of indices; iterable again and again."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[Sample]]:
        return self._loader.sample_lists()


class _EncodedSamples(Dataset[EncodedSample]):
    """torch's data set: whatever sample is asked for, encoded."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __getitem__(self, sample: Sample) -> EncodedSample | _Failure:  # type: ignore[override]
        return _encoded(self._encoder, sample)


def _encoded(encoder: Encoder, sample: Sample) -> EncodedSample | _Failure:
    try:
        return encoder.encode(sample)
    except SampleProblem as problem:
        return _Failure(str(sample.source), sample.sample_id, problem.reason)


def _collate_or_failure(
    items: Sequence[EncodedSample | _Failure], pad_token_id: int, layout: ImageLayout
) -> MicroBatch | _Failure:
    samples: list[EncodedSample] = []
    for item in items:
        if isinstance(item, _Failure):
            return item
        samples.append(item)
    return collate(samples, pad_token_id, layout)


def _next_batch(batches: Iterator[MicroBatch | _Failure]) -> MicroBatch:
    try:
        batch = next(batches)
    except RuntimeError as error:
        if not _WORKER_ENDED.search(str(error)):
            raise
        raise EnvironmentProblem(
            f"a data worker was ended by the system: {str(error).splitlines()[0]}",
            expected="enough memory and shared memory (/dev/shm) for the workers",
            next_step="set data.num_workers lower (0 decodes in the training process), or free memory",
        ) from error
    return _batch_or_raise(batch)


def _batch_or_raise(batch: MicroBatch | _Failure) -> MicroBatch:
    if isinstance(batch, _Failure):
        raise DataError(
            f"sample {batch.sample_id} ({batch.where}) can't be read any more: {batch.reason}",
            expected="data files and images that stay as they were checked before training",
            next_step="restore the file and resume the run, or start again so that the sample is set aside",
        )
    return batch


def _start_context(start_method: str) -> multiprocessing.context.BaseContext:
    if start_method == "auto":
        start_method = "fork" if sys.platform == "linux" else "spawn"
    return multiprocessing.get_context(start_method)
