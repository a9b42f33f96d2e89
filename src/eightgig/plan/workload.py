"""What a planned run works on: the largest samples that its settings let through, as many as a pass takes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from eightgig.data.batch import MicroBatch
from eightgig.data.encode import Encoder
from eightgig.data.loader import validation_batches
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.models.load import load_processor

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

QUESTION = "What is shown?"
_SAMPLES = {"training": {"batch_size"}, "hardware": {"micro_batches_per_pass"}}
WORD = "a "  # at least one token in every vocabulary, so that enough of them fill a sample


@dataclass(frozen=True)
class Workload:
    """What one pass and one answer to it are made of.

    Attributes:
        processor: the model's, set to the configured image size.
        samples: those of the pass.
        batch: the samples of a training pass: one micro-batch, or several where they share passes.
        validation: the first of them, as validation takes them: one micro-batch.
        num_generated: how many of the samples validation answers.
    """

    processor: Any
    encoder: Encoder
    samples: tuple[Sample, ...]
    batch: MicroBatch
    validation: MicroBatch
    num_generated: int


def largest_workload(config: TrainingConfig, spec: ModelSpec) -> Workload:
    """A pass of samples with one square image, as large as `data.image_size` (else the model) takes it, and
    `data.max_length` text tokens, most of them in the answer.

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel, EnvironmentProblem: its processor can't be had.
    """
    encoder, processor = build_encoder(with_standin(config), spec)
    sample = _largest_sample(config.data.image_size or spec.facts.image_px, config.data.max_length)
    return workload_of((sample,) * config.samples_per_pass, encoder, processor, config)


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
    batch, validation = pass_and_validation(samples, encoder, config)
    num_generated = min(config.validation.num_generated, len(validation.sample_ids))
    return Workload(processor, encoder, tuple(samples), batch, validation, num_generated)


def pass_and_validation(
    samples: Sequence[Sample], encoder: Encoder, config: TrainingConfig
) -> tuple[MicroBatch, MicroBatch]:
    """`samples` as one batch, and as many of them as a batch of validation has.

    Raises:
        DataError: one of them can't be read.
    """
    (batch,) = validation_batches(encoder, samples, batch_size=len(samples))
    first = samples[: config.training.batch_size]
    if len(first) == len(samples):
        return batch, batch
    (validation,) = validation_batches(encoder, first, batch_size=len(first))
    return batch, validation


def workload_sizes(work: Workload) -> dict[str, int]:
    """How much a pass holds: samples, images, and tokens, those of its texts (with the chat template's own) and
    those of its images apart; padding is not counted.
    """
    num_text_tokens = sum(work.encoder.measure(sample).num_text_tokens for sample in work.samples)
    return {
        "num_samples": len(work.samples),
        "num_images": work.batch.num_images,
        "num_tokens": work.batch.num_tokens,
        "num_text_tokens": num_text_tokens,
        "num_image_tokens": work.batch.num_tokens - num_text_tokens,
    }


def _largest_sample(image_px: int, max_length: int) -> Sample:
    picture = io.BytesIO()
    Image.new("RGB", (image_px, image_px)).save(picture, "png")
    question = Message("user", (ImagePart(data=picture.getvalue()), TextPart(QUESTION)))
    answer = Message("assistant", (TextPart((WORD * max_length).strip()),))
    return Sample("planned", (question, answer), SourceRef(Path("planned"), 0))
