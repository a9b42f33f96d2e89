"""The pass over a run's own data that takes the most memory, for its plan."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from eightgig.data.check import SampleSize
from eightgig.data.encode import Encoder
from eightgig.plan.workload import Workload, pass_and_validation

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.train.run import DataSets


def largest_training_batch(config: TrainingConfig, spec: ModelSpec, encoder: Encoder, data: DataSets) -> Workload:
    """A pass over the training samples with the most tokens, image tokens among them.

    Validation is planned with the same samples: it answers as many of them as a batch of it holds, and none where the
    run has no validation samples.

    Raises:
        DataError: an image that was good when it was checked can't be read any more.
    """
    rank = _rank(config, spec)
    order = heapq.nlargest(
        config.samples_per_pass, range(len(data.train)), key=lambda index: rank(data.train_sizes[index])
    )
    samples = tuple(data.train[index] for index in order)
    batch, validation = pass_and_validation(samples, encoder, config)
    num_generated = min(config.validation.num_generated, len(validation.sample_ids)) if data.validation else 0
    return Workload(encoder.processor, encoder, samples, batch, validation, num_generated)


class LargestTrainingBatches:
    """`largest_training_batch` for variants of a run's settings: made once for those that take as many samples."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, data: DataSets) -> None:
        self._spec, self._encoder, self._data = spec, encoder, data
        self._known: dict[tuple[int, int], Workload] = {}

    def __call__(self, config: TrainingConfig) -> Workload:
        """The pass of `config`. Raises what `largest_training_batch` does."""
        size = (config.training.batch_size, config.samples_per_pass)
        if size not in self._known:
            self._known[size] = largest_training_batch(config, self._spec, self._encoder, self._data)
        return self._known[size]


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


def _rank(config: TrainingConfig, spec: ModelSpec) -> Callable[[SampleSize], tuple[int, int]]:
    """What orders samples by their tokens.

    Image tokens of a derived family can only be counted by processing each image: its samples are ordered by their
    pixels, then by their text.
    """
    if spec.family.derivation:
        return lambda size: (sum(width * height for width, height in size.image_sizes_px), size.num_text_tokens)

    @functools.cache
    def num_image_tokens(width_px: int, height_px: int) -> int:
        return spec.family.num_image_tokens(spec.facts, config.data.image_size, width_px=width_px, height_px=height_px)

    return lambda size: (size.num_text_tokens + sum(num_image_tokens(*size_px) for size_px in size.image_sizes_px), 0)
