"""What a planned run works on: the largest samples that its settings let through, as many as a pass takes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from eightgig.config import Batching
from eightgig.data.batch import EncodedSample, MicroBatch
from eightgig.data.collate import pack
from eightgig.data.encode import Encoder
from eightgig.data.loader import encoded_samples, validation_batches
from eightgig.data.order import StepOrder
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.models.load import load_processor
from eightgig.models.packed_rows import check_can_pack

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

QUESTION = "What is shown?"
_SAMPLES = {"training": {"batch_size", "batching"}, "hardware": {"micro_batches_per_pass"}}
WORD = "a "  # at least one token in every vocabulary, so that enough of them fill a sample


@dataclass(frozen=True)
class Workload:
    """What one pass and one answer to it are made of.

    Attributes:
        processor: the model's, set to the configured image size.
        samples: those of the pass.
        batch: the samples of a training pass: one micro-batch, or several where they share passes.
        num_generated: how many of the samples validation answers.
        validation: what validation takes, where it is not what training takes.
        num_micro_batches: of an optimizer step in the mean; None: as many passes as the settings say.
    """

    processor: Any
    encoder: Encoder
    samples: tuple[Sample, ...]
    batch: MicroBatch
    num_generated: int
    validation: Workload | None = None
    num_micro_batches: float | None = None


@dataclass(frozen=True)
class MeasuredSample:
    """A good sample and its tokens; those of the text are counted after cutting to `data.max_length`."""

    sample: Sample
    num_text_tokens: int
    num_image_tokens: int

    @property
    def num_tokens(self) -> int:
        """All that the language model sees."""
        return self.num_text_tokens + self.num_image_tokens


def largest_workload(config: TrainingConfig, spec: ModelSpec) -> Workload:
    """A pass of samples with one square image, as large as `data.image_size` (else the model) takes it, and
    `data.max_length` text tokens, most of them in the answer.

    Where samples share rows, a row of as many tokens, with as many such images as short texts leave room for.

    Raises:
        ConfigError: the configured image size does not suit the model, or its samples can't share rows.
        UnsupportedModel, EnvironmentProblem: its processor can't be had.
    """
    encoder, processor = build_encoder(with_standin(config), spec)
    image_px = config.data.image_size or spec.facts.image_px
    sample = _sample(image_px, num_words=config.data.max_length)
    plain = workload_of((sample,) * config.samples_per_pass, encoder, processor, config)
    if config.training.batching is not Batching.PACKED:
        return plain
    check_can_pack(config, spec)
    shortest = _sample(image_px, num_words=1)
    num_text_tokens, num_tokens = encoder.measure(shortest).num_text_tokens, len(encoder.encode(shortest).input_ids)
    measured = MeasuredSample(shortest, num_text_tokens, num_tokens - num_text_tokens)
    return largest_row([measured] * (plain.batch.num_tokens // num_tokens), plain.batch.num_tokens, plain)


class LargestWorkloads:
    """`largest_workload` for variants of a run's settings: made once for those that it is equal for."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._known: dict[str, Workload] = {}

    def __call__(self, config: TrainingConfig) -> Workload:
        """The pass of `config`. Raises what `largest_workload` does."""
        key = config.model_dump_json(include={"model": True, "data": True, "validation": True, **_SAMPLES})
        if key not in self._known:
            self._known[key] = largest_workload(config, self._spec)
        return self._known[key]


def with_standin(config: TrainingConfig) -> TrainingConfig:
    """`config` with random weights: for a model without a folder `load_processor` then needs no hub."""
    return config.model_copy(update={"model": config.model.model_copy(update={"random_weights_seed": 0})})


def build_encoder(config: TrainingConfig, spec: ModelSpec) -> tuple[Encoder, Any]:
    """What makes tensors of samples in a run of `config`, and its processor, set to the configured image size.

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel, EnvironmentProblem: its processor can't be had.
    """
    image_px = config.data.image_size
    if image_px is not None:
        spec.family.check_image_px(spec.facts, image_px)
    processor = load_processor(config, spec)
    spec.family.apply_image_px(None, processor, image_px)
    return Encoder(processor, spec.family, max_length=config.data.max_length), processor


def workload_of(samples: Sequence[Sample], encoder: Encoder, processor: Any, config: TrainingConfig) -> Workload:
    """The pass of `samples`, with as many of a micro-batch answered as `config` lets validation answer.

    Raises:
        DataError: one of them can't be read.
    """
    (batch,) = validation_batches(encoder, samples, batch_size=len(samples))
    num_at_once = config.training.batch_size  # of validation
    num_generated = min(config.validation.num_generated, len(samples), num_at_once)
    validation = workload_of(samples[:num_at_once], encoder, processor, config) if len(samples) > num_at_once else None
    return Workload(processor, encoder, tuple(samples), batch, num_generated, validation)


def largest_row(
    samples: Sequence[MeasuredSample],
    capacity_tokens: int,
    plain: Workload,
    *,
    is_sound: Callable[[Sample], bool] = lambda sample: True,
) -> Workload:
    """A row that no row of training samples goes beyond, of its tokens or, but for one sample, of its images.

    Samples with the largest share of image tokens are put in first, as they fit; text fills what is left.

    Args:
        samples: those that may share a row.
        capacity_tokens: the most that a row may have.
        plain: what validation takes, a row a sample.
        is_sound: tells the samples that can be encoded; the others are left out.

    Raises:
        DataError: one of them can't be read.
    """
    chosen, room = [], capacity_tokens
    for item in sorted(samples, key=lambda item: (item.num_image_tokens / item.num_tokens, item.num_tokens))[::-1]:
        if item.num_tokens <= room and is_sound(item.sample):
            chosen.append(item.sample)
            room -= item.num_tokens
    return packed_workload(chosen, plain, num_filler_tokens=room)


def packed_workload(samples: Sequence[Sample], plain: Workload, *, num_filler_tokens: int = 0) -> Workload:
    """The row that `samples` share, `num_filler_tokens` of text behind them; validation takes `plain`.

    Raises:
        DataError: one of them can't be read.
    """
    encoder = plain.encoder
    encoded = encoded_samples(encoder, samples)
    if num_filler_tokens:
        encoded.append(_filler(encoded[0], encoder.pad_token_id, num_filler_tokens))
    row = pack(encoded, encoder.image_layout)
    return replace(plain, samples=tuple(samples), batch=row, validation=plain)


def _filler(like: EncodedSample, token_id: int, num_tokens: int) -> EncodedSample:
    """Text, of which each token is learnt, with the token inputs of `like`."""
    input_ids = torch.full((num_tokens,), token_id)
    return EncodedSample(
        input_ids=input_ids,
        labels=input_ids,
        image_inputs={},
        sample_id="filler",
        num_images=0,
        token_inputs={
            name: value.new_zeros((num_tokens, *value.shape[1:])) for name, value in like.token_inputs.items()
        },
    )


def mean_micro_batches(order: StepOrder) -> float:
    """Micro-batches of an optimizer step, in the mean of an epoch."""
    return fmean(len(order.micro_batches(step)) for step in range(order.steps_per_epoch))


def workload_sizes(work: Workload) -> dict[str, int]:
    """How much a pass holds: samples, images, and tokens, those of its texts (with the chat template's own) and
    those of its images apart; padding is not counted.
    """
    num_text_tokens = sum(work.encoder.measure(sample).num_text_tokens for sample in work.samples)
    of_samples = work.batch.segment_lengths[: len(work.samples)]  # what fills up a row is text
    num_image_tokens = (sum(of_samples) or work.batch.num_tokens) - num_text_tokens
    return {
        "num_samples": len(work.samples),
        "num_images": work.batch.num_images,
        "num_tokens": work.batch.num_tokens,
        "num_text_tokens": work.batch.num_tokens - num_image_tokens,
        "num_image_tokens": num_image_tokens,
    }


def _sample(image_px: int, *, num_words: int) -> Sample:
    picture = io.BytesIO()
    Image.new("RGB", (image_px, image_px)).save(picture, "png")
    question = Message("user", (ImagePart(data=picture.getvalue()), TextPart(QUESTION)))
    answer = Message("assistant", (TextPart((WORD * num_words).strip()),))
    return Sample("planned", (question, answer), SourceRef(Path("planned"), 0))
