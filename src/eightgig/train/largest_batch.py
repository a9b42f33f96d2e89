"""The pass over a run's own data that takes the most memory, for its plan and its rehearsal."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eightgig.config import Batching
from eightgig.data.check import SampleSize
from eightgig.data.encode import Encoder
from eightgig.data.grouping import Grouping
from eightgig.data.order import MicroBatchOrder, StepOrder
from eightgig.plan.workload import MeasuredSample, Workload, largest_row, mean_micro_batches, workload_of

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.train.run import DataSets


def largest_training_batch(
    config: TrainingConfig, spec: ModelSpec, encoder: Encoder, data: DataSets, order: StepOrder
) -> Workload:
    """A pass over the training samples with the most tokens, image tokens among them.

    Validation is planned with the same samples: it answers as many of them as a batch of it holds, and none where the
    run has no validation samples. Where samples share rows, training is planned with a full row instead, and with as
    many of them as a step of `order` has in the mean.

    Raises:
        DataError: an image that was good when it was checked can't be read any more.
    """
    sizes = sample_sizes(config, spec, data)
    largest = heapq.nlargest(config.samples_per_pass, range(len(sizes)), key=lambda index: sizes[index])
    samples = tuple(data.train[index] for index in largest)
    plain = workload_of(samples, encoder, encoder.processor, config)
    if not data.validation:
        plain = _without_answers(plain)
    if config.training.batching is not Batching.PACKED:
        return plain
    measured = [
        MeasuredSample(sample, size.num_text_tokens, num_tokens - size.num_text_tokens)
        for sample, size, num_tokens in zip(data.train, data.train_sizes, sizes, strict=True)
    ]
    row = largest_row(measured, order.grouping.row_tokens, plain)
    return replace(row, num_micro_batches=mean_micro_batches(order))


def _without_answers(work: Workload) -> Workload:
    validation = None if work.validation is None else _without_answers(work.validation)
    return replace(work, num_generated=0, validation=validation)


def sample_sizes(config: TrainingConfig, spec: ModelSpec, data: DataSets) -> list[Any]:
    """What orders the training samples by length: their tokens; see `_rank` for derived families."""
    rank = _rank(config, spec)
    return [rank(size) for size in data.train_sizes]


def largest_micro_batch(
    config: TrainingConfig, spec: ModelSpec, data: DataSets, order: MicroBatchOrder, steps: range
) -> list[int]:
    """Sample indices of the micro-batch in `steps` (0-based) of `order` with the most tokens, padding among them."""
    sizes = sample_sizes(config, spec, data)

    def computed(indices: list[int]) -> Any:
        if order.is_packed:
            return sum(sizes[index] for index in indices)
        longest = max(sizes[index] for index in indices)
        return tuple(len(indices) * part for part in longest) if spec.family.derivation else len(indices) * longest

    return max((indices for step in steps for indices in order.micro_batches(step)), key=computed)


class LargestTrainingBatches:
    """`largest_training_batch` for variants of a run's settings: made once for those that take as many samples."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, data: DataSets) -> None:
        self._spec, self._encoder, self._data = spec, encoder, data
        self._known: dict[tuple[int, int], Workload] = {}

    def __call__(self, config: TrainingConfig) -> Workload:
        """The pass of `config`. Raises what `largest_training_batch` does."""
        size = (config.training.batch_size, config.samples_per_pass)
        if size not in self._known:
            order = training_order(config, self._spec, self._data)
            self._known[size] = largest_training_batch(config, self._spec, self._encoder, self._data, order)
        return self._known[size]


def training_order(config: TrainingConfig, spec: ModelSpec, data: DataSets) -> StepOrder:
    """Which training samples each optimizer step of `config` sees, and which of them go through together."""
    grouping = Grouping(config.training.batching, config.samples_per_pass, sample_sizes(config, spec, data))
    return StepOrder(len(data.train), config.samples_per_pass, config.passes_per_step, config.seed, grouping)


def num_image_tokens(config: TrainingConfig, spec: ModelSpec, data: DataSets) -> int:
    """The image tokens of the whole training set; an image that stands twice counts twice.

    Not for derived families, whose image tokens can only be counted by processing each image.
    """
    image_px = config.data.image_size
    sizes = Counter(size_px for size in data.train_sizes for size_px in size.image_sizes_px)
    return sum(
        count * spec.family.num_image_tokens(spec.facts, image_px, width_px=width_px, height_px=height_px)
        for (width_px, height_px), count in sizes.items()
    )


def _rank(config: TrainingConfig, spec: ModelSpec) -> Callable[[SampleSize], Any]:
    """What orders samples by their tokens.

    Image tokens of a derived family can only be counted by processing each image: its samples are ordered by their
    pixels, then by their text.
    """
    if spec.family.derivation:
        return lambda size: (sum(width * height for width, height in size.image_sizes_px), size.num_text_tokens)

    @functools.cache
    def num_image_tokens(width_px: int, height_px: int) -> int:
        return spec.family.num_image_tokens(spec.facts, config.data.image_size, width_px=width_px, height_px=height_px)

    return lambda size: size.num_text_tokens + sum(num_image_tokens(*size_px) for size_px in size.image_sizes_px)
