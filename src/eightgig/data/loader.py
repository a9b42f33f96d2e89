"""Micro-batches, decoded and encoded by worker processes, from any optimizer step on."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from eightgig.core.errors import DataError, EnvironmentProblem
from eightgig.core.logging import get_logger
from eightgig.data.batch import EncodedSample, MicroBatch
from eightgig.data.collate import collate, pack
from eightgig.data.encode import Encoder
from eightgig.data.order import MicroBatchOrder
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import Sample
from eightgig.data.worker_signals import leave_signals_to_training
from eightgig.data.workers import POLL_S, WorkersFailed, next_of, quiet_when_a_worker_ends
from eightgig.registry.facts import ImageLayout

Value = TypeVar("Value")

MAX_RESTARTS_IN_A_ROW = 2  # for one micro-batch: what ends its worker a third time is not chance
MAX_RESTARTS = 20  # in all: a machine that ends workers again and again has too little memory for them

logger = get_logger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """How micro-batches are made.

    Attributes:
        num_workers: worker processes; 0 decodes in the training process itself.
        start_method: "fork", "spawn", "forkserver", or "auto" (fork on Linux, where it is quickest, else spawn).
        pin_memory: whether batches lie in page-locked memory, for copies to a GPU that overlap with its work.
        timeout_s: how long a micro-batch is waited for before its worker counts as hung; None = without end.
    """

    num_workers: int = 0
    start_method: str = "auto"
    pin_memory: bool = False
    timeout_s: float | None = None


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

        Workers that die or hang are started anew, from the micro-batch that was waited for: what comes is the same.

        Raises:
            DataError: a sample that was good before can't be read any more, e.g. because its image has gone.
            EnvironmentProblem: workers died or hung again and again.
        """
        batches = self._batches()
        for step in self._steps:
            yield [_or_raise(next(batches)) for _ in self._share(step)]

    def _batches(self) -> Iterator[MicroBatch | _Failure]:
        """All micro-batches to come, in order, from workers that are started again where they fail."""
        num_done = num_restarts = num_in_a_row = 0
        num_batches = sum(len(self._share(step)) for step in self._steps)
        batches, processes = self._started(0)
        while num_done < num_batches:
            try:
                batch = next_of(batches, self._workers.timeout_s)
            except WorkersFailed as failed:
                reason = str(failed)
            else:
                num_done, num_in_a_row = num_done + 1, 0
                yield batch
                continue
            for process in processes:  # not asked to end: one that hangs would not hear it
                process.kill()
            # Outside of the handler: the error's traceback holds the iterator, which lets go of its processes here.
            del batches
            num_restarts, num_in_a_row = num_restarts + 1, num_in_a_row + 1
            waited_for = next(itertools.islice(self.sample_lists(), num_done, None))
            where = ", ".join(f"{sample.sample_id} ({sample.source})" for sample in waited_for)
            if num_in_a_row > MAX_RESTARTS_IN_A_ROW or num_restarts > MAX_RESTARTS:
                raise _ended_again(reason, where, num_restarts)
            logger.warning("%s; it was waited for %s. All data workers start again from there.", reason, where)
            batches, processes = self._started(num_done)

    def _started(self, num_done: int) -> tuple[Iterator[MicroBatch | _Failure], list[BaseProcess]]:
        """The micro-batches after the first `num_done`, and the processes that make them."""
        others = set(multiprocessing.active_children())
        with quiet_when_a_worker_ends():
            batches = iter(self._data_loader(num_done))
        return batches, [process for process in multiprocessing.active_children() if process not in others]

    def _share(self, step: int) -> list[list[int]]:
        """The micro-batches of `step` that this process gets, as sample indices."""
        return self._order.micro_batches(step)[self._process_index :: self._num_processes]

    def _data_loader(self, num_done: int) -> DataLoader[EncodedSample]:
        num_workers = self._workers.num_workers
        return DataLoader(
            _EncodedSamples(self._encoder),
            batch_sampler=_SampleLists(self, num_done),  # samples themselves, not indices: see the class's text
            collate_fn=partial(
                _collate_or_failure,
                pad_token_id=self._encoder.pad_token_id,
                layout=self._encoder.image_layout,
                packs=self._order.is_packed,
            ),
            num_workers=num_workers,
            worker_init_fn=leave_signals_to_training,
            multiprocessing_context=_start_context(self._workers.start_method) if num_workers else None,
            pin_memory=self._workers.pin_memory,
            timeout=POLL_S if num_workers else 0,
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
        encoded = encoded_samples(encoder, samples[start : start + batch_size])
        yield collate(encoded, encoder.pad_token_id, encoder.image_layout)


def encoded_samples(encoder: Encoder, samples: Sequence[Sample]) -> list[EncodedSample]:
    """`samples` as tensors, decoded in place.

    Raises:
        DataError: a sample that was good before can't be read any more.
    """
    return [_or_raise(_encoded(encoder, sample)) for sample in samples]


@dataclass(frozen=True)
class _Failure:
    """Why a sample gave no tensors; sent as a value, since torch rebuilds exceptions of workers from one text."""

    where: str
    sample_id: str
    reason: str


class _SampleLists:
    """torch's batch sampler, handing over samples themselves instead of indices; iterable again and again."""

    def __init__(self, loader: StepLoader, num_done: int) -> None:
        self._loader = loader
        self._num_done = num_done

    def __iter__(self) -> Iterator[list[Sample]]:
        return itertools.islice(self._loader.sample_lists(), self._num_done, None)


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
    items: Sequence[EncodedSample | _Failure], pad_token_id: int, layout: ImageLayout, *, packs: bool
) -> MicroBatch | _Failure:
    samples: list[EncodedSample] = []
    for item in items:
        if isinstance(item, _Failure):
            return item
        samples.append(item)
    return pack(samples, layout) if packs else collate(samples, pad_token_id, layout)


def _ended_again(reason: str, where: str, num_restarts: int) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{reason}, for the {num_restarts}th time in this run; it was waited for {where}"
        if num_restarts > MAX_RESTARTS
        else f"{reason}, {num_restarts} times in a row; it was waited for {where}",
        expected="workers with enough memory and shared memory (/dev/shm), and images that can be read in "
        "data.worker_timeout_s",
        next_step="set data.num_workers lower (0 decodes in the training process), free memory, or look at these "
        "samples' images; then go on with `eightgig train --resume`",
    )


def _or_raise(value: Value | _Failure) -> Value:
    if isinstance(value, _Failure):
        raise DataError(
            f"sample {value.sample_id} ({value.where}) can't be read any more: {value.reason}",
            expected="data files and images that stay as they were checked before training",
            next_step="restore the file and resume the run, or start again so that the sample is set aside",
        )
    return value


def _start_context(start_method: str) -> multiprocessing.context.BaseContext:
    if start_method == "auto":
        start_method = "fork" if sys.platform == "linux" else "spawn"
    return multiprocessing.get_context(start_method)
