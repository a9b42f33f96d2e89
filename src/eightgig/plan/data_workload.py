"""What a user's own data makes of a run: the largest micro-batches that can come, and a usual one.

Each sample's tokens are counted: those of its text with the model's tokenizer, those of its images from their sizes.
The largest micro-batch holds the samples with the most tokens, whatever order training takes them in. Where other
samples have more image tokens, which decide what the vision tower takes, theirs is a candidate too. A usual micro-batch
holds the samples nearest to the mean length to which an epoch's micro-batches are padded. Where samples share rows, the
largest is a full row with as many images as go into one, and the usual one is a row as full as the mean one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from eightgig.config import Batching
from eightgig.core.errors import EnvironmentProblem
from eightgig.data.check import CheckedSample, examine_samples
from eightgig.data.encode import Encoder
from eightgig.data.grouping import Grouping
from eightgig.data.images import check_image
from eightgig.data.order import StepOrder
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import Sample, TextPart
from eightgig.data.sets import ReadData
from eightgig.data.sources import SampleSet
from eightgig.data.split import split_validation
from eightgig.models.packed_rows import check_can_pack
from eightgig.plan.workload import (
    MeasuredSample,
    Workload,
    build_encoder,
    largest_row,
    mean_micro_batches,
    packed_workload,
    with_standin,
    workload_of,
)

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

# What bounds the time that a plan takes.
MAX_DECODED_SAMPLES = 500
MAX_MEASURED_SAMPLES = 5_000
NUM_LONGEST_TEXTS = 100

MOST_TOKENS = "most tokens"
MOST_IMAGE_TOKENS = "most image tokens"


@dataclass(frozen=True)
class DataFacts:
    """What was found in the data.

    Attributes:
        num_train_samples, num_validation_samples: as training will have them; where not all were measured, bad ones
            among the others are still counted.
        samples_a_step: of an optimizer step.
        mean_tokens, max_tokens: of one training sample among those measured.
        notes: what the numbers rest on where that is not every sample in full, a sentence each.
    """

    num_train_samples: int
    num_validation_samples: int
    samples_a_step: int
    mean_tokens: float
    max_tokens: int
    notes: tuple[str, ...]

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps that see every training sample once."""
        return -(-self.num_train_samples // self.samples_a_step)


@dataclass(frozen=True)
class DataWorkloads:
    """The micro-batches that stand for the data.

    Attributes:
        largest: candidates for the most memory, by what they have the most of.
        usual: the one that decides the time.
    """

    largest: Mapping[str, Workload]
    usual: Workload
    facts: DataFacts


def data_workloads(config: TrainingConfig, spec: ModelSpec, read: ReadData) -> DataWorkloads:
    """The micro-batches that the data of `config`, as it was `read`, can make.

    Samples are checked as training checks them. Of more than MAX_DECODED_SAMPLES the images' headers are read, not
    their pixels; of more than MAX_MEASURED_SAMPLES an even share is measured, and the longest texts.

    Raises:
        DataError: too large a share of the samples is bad; the same that training would raise.
        ConfigError: the configured image size does not suit the model, or its samples can't share rows.
        UnsupportedModel, EnvironmentProblem: its processor can't be had.
    """
    check_can_pack(config, spec)
    encoder, processor, tokenizer_note = _encoder(config, spec)
    sets = [read.train] if read.validation is None else [read.train, read.validation]
    decodes_images = sum(len(read_set.samples) for read_set in sets) <= MAX_DECODED_SAMPLES

    def measure(read_set: SampleSet) -> list[MeasuredSample]:
        checked = examine_samples(
            read_set,
            encoder,
            read.quarantine,
            max_bad_fraction=config.data.max_bad_fraction,
            decodes_images=decodes_images,
        )
        return [_measured(item, config, spec) for item in checked]

    even = [measure(_even_share(read_set)) for read_set in sets]
    longest = [item for read_set in sets for item in _measured_longest(read_set, measure)]
    train, num_train, num_validation = _split(read, even, config)

    def batch_of(ordered: Sequence[MeasuredSample]) -> Workload:
        return workload_of(_sound(ordered, config.samples_per_pass), encoder, processor, config)

    everything = [*itertools.chain(*even), *longest]
    largest = _largest(everything, batch_of)
    order = _order(train, config)
    if config.training.batching is Batching.PACKED:
        capacity_tokens = _grouping(everything, config).row_tokens
        usual = _usual_row(train, order, largest[MOST_TOKENS])
        largest = {
            reason: largest_row(everything, capacity_tokens, plain, is_sound=_can_decode)
            for reason, plain in largest.items()
        }
    else:
        usual = batch_of(_nearest_to_usual(train, order))
    return DataWorkloads(
        largest=largest,
        usual=usual,
        facts=DataFacts(
            num_train_samples=num_train,
            num_validation_samples=num_validation,
            samples_a_step=config.training.batch_size * config.training.gradient_accumulation_steps,
            mean_tokens=fmean(item.num_tokens for item in train),
            max_tokens=max(item.num_tokens for item in train),
            notes=tuple(_notes(tokenizer_note, sets, decodes_images=decodes_images)),
        ),
    )


def _encoder(config: TrainingConfig, spec: ModelSpec) -> tuple[Encoder, Any, str | None]:
    """Encoder and processor of the run; of a stand-in, and why, where the hub does not give the model's own."""
    try:
        return *build_encoder(config, spec), None
    except EnvironmentProblem as problem:
        if spec.facts.folder is not None:
            raise
        note = (
            f"each byte of text counts as a token, which is too many: {problem.found}; once it can be had, plan again "
            "with --no-cache"
        )
        return *build_encoder(with_standin(config), spec), note


def _measured(checked: CheckedSample, config: TrainingConfig, spec: ModelSpec) -> MeasuredSample:
    num_image_tokens = sum(
        spec.family.num_image_tokens(spec.facts, config.data.image_size, width_px=width_px, height_px=height_px)
        for width_px, height_px in checked.image_sizes_px
    )
    return MeasuredSample(checked.sample, checked.text.num_text_tokens, num_image_tokens)


def _even_share(read_set: SampleSet) -> SampleSet:
    """`read_set`, or MAX_MEASURED_SAMPLES of it at even distances, with as large a share of its bad records."""
    num_samples = len(read_set.samples)
    if num_samples <= MAX_MEASURED_SAMPLES:
        return read_set
    indices = (index * num_samples // MAX_MEASURED_SAMPLES for index in range(MAX_MEASURED_SAMPLES))
    num_bad = len(read_set.bad) * MAX_MEASURED_SAMPLES // num_samples
    return replace(read_set, samples=tuple(read_set.samples[index] for index in indices), bad=read_set.bad[:num_bad])


def _measured_longest(
    read_set: SampleSet, measure: Callable[[SampleSet], list[MeasuredSample]]
) -> list[MeasuredSample]:
    """The samples with the most characters, of a set that is too large to be measured as a whole."""
    if len(read_set.samples) <= MAX_MEASURED_SAMPLES:
        return []
    longest = sorted(read_set.samples, key=_num_characters, reverse=True)[:NUM_LONGEST_TEXTS]
    return measure(replace(read_set, samples=tuple(longest), bad=()))


def _num_characters(sample: Sample) -> int:
    return sum(len(part.text) for message in sample.messages for part in message.parts if isinstance(part, TextPart))


def _split(
    read: ReadData, even: Sequence[list[MeasuredSample]], config: TrainingConfig
) -> tuple[list[MeasuredSample], int, int]:
    """The measured training samples, and how many samples training and validation have, as `train` splits them."""
    is_whole = len(read.train.samples) <= MAX_MEASURED_SAMPLES
    samples = tuple(item.sample for item in even[0]) if is_whole else read.train.samples
    if read.validation is None:
        train_samples, held_out = split_validation(samples, config.data.val_fraction, config.seed)
        num_validation = len(held_out)
    else:
        train_samples = samples
        is_whole = len(read.validation.samples) <= MAX_MEASURED_SAMPLES
        num_validation = len(even[1]) if is_whole else len(read.validation.samples)
    kept = {id(sample) for sample in train_samples}
    limit = config.validation.max_samples
    return (
        [item for item in even[0] if id(item.sample) in kept],
        len(train_samples),
        num_validation if limit is None else min(num_validation, limit),
    )


def _largest(
    samples: Sequence[MeasuredSample], batch_of: Callable[[Sequence[MeasuredSample]], Workload]
) -> dict[str, Workload]:
    """The micro-batch with the most tokens, and the one with the most image tokens where it has more of them."""
    by_tokens = sorted(samples, key=lambda item: (item.num_tokens, item.num_image_tokens), reverse=True)
    by_image_tokens = sorted(samples, key=lambda item: (item.num_image_tokens, item.num_tokens), reverse=True)
    largest = {MOST_TOKENS: batch_of(by_tokens)}
    num_samples = len(largest[MOST_TOKENS].samples)
    in_first, most = (
        sum(item.num_image_tokens for item in ordered[:num_samples]) for ordered in (by_tokens, by_image_tokens)
    )
    if most > in_first:
        largest[MOST_IMAGE_TOKENS] = batch_of(by_image_tokens)
    return largest


def _order(samples: Sequence[MeasuredSample], config: TrainingConfig) -> StepOrder:
    """The order in which training would take `samples`."""
    return StepOrder(
        len(samples),
        config.samples_per_pass,
        config.passes_per_step,
        config.seed,
        _grouping(samples, config),
    )


def _grouping(samples: Sequence[MeasuredSample], config: TrainingConfig) -> Grouping:
    return Grouping(config.training.batching, config.samples_per_pass, [item.num_tokens for item in samples])


def _usual_row(samples: Sequence[MeasuredSample], order: StepOrder, plain: Workload) -> Workload:
    """The row of the first epoch whose tokens are nearest to the mean of all."""
    rows = [row for step in range(order.steps_per_epoch) for row in order.micro_batches(step)]
    tokens = [sum(samples[index].num_tokens for index in row) for row in rows]
    mean_tokens = fmean(tokens)
    usual = min(range(len(rows)), key=lambda row: abs(tokens[row] - mean_tokens))
    row = packed_workload(_sound([samples[index] for index in rows[usual]], len(rows[usual])), plain)
    return replace(row, num_micro_batches=mean_micro_batches(order))


def _nearest_to_usual(samples: Sequence[MeasuredSample], order: StepOrder) -> list[MeasuredSample]:
    """`samples`, those first whose tokens are nearest to what an epoch's micro-batches are padded to in the mean."""
    padded_tokens = fmean(
        max(samples[index].num_tokens for index in micro_batch)
        for step in range(order.steps_per_epoch)
        for micro_batch in order.micro_batches(step)
    )
    return sorted(samples, key=lambda item: abs(item.num_tokens - padded_tokens))


def _sound(ordered: Sequence[MeasuredSample], num_samples: int) -> list[Sample]:
    """The first samples whose images can be decoded; the very first where none can, for its error to be raised."""
    decodable = (item.sample for item in ordered if _can_decode(item.sample))
    return list(itertools.islice(decodable, num_samples)) or [ordered[0].sample]


def _can_decode(sample: Sample) -> bool:
    try:
        for part in sample.images:
            check_image(part)
    except SampleProblem:
        return False  # training sets it aside
    return True


def _notes(tokenizer_note: str | None, sets: Sequence[SampleSet], *, decodes_images: bool) -> Iterator[str]:
    if tokenizer_note is not None:
        yield tokenizer_note
    if not decodes_images:
        yield "pictures were measured by their headers; training decodes every one before it begins"
    sizes = [len(read_set.samples) for read_set in sets]
    if max(sizes) > MAX_MEASURED_SAMPLES:
        num_measured = sum(min(size, MAX_MEASURED_SAMPLES) for size in sizes)
        yield f"measured were {num_measured:,} of {sum(sizes):,} samples, at even distances, and the longest texts"
