"""What a planned run works on: one micro-batch of the largest samples that its settings let through."""

from __future__ import annotations

import io
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
WORD = "a "  # at least one token in every vocabulary, so that enough of them fill a sample


@dataclass(frozen=True)
class Workload:
    """What one micro-batch and one answer to it are made of.

    Attributes:
        processor: the model's, set to the configured image size.
        samples: those of the micro-batch.
        batch: the micro-batch.
        num_generated: how many of the samples validation answers.
    """

    processor: Any
    encoder: Encoder
    samples: tuple[Sample, ...]
    batch: MicroBatch
    num_generated: int


def largest_workload(config: TrainingConfig, spec: ModelSpec) -> Workload:
    """A micro-batch of samples with one square image, as large as `data.image_size` (else the model) takes it, and
    `data.max_length` text tokens, most of them in the answer.

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel, EnvironmentProblem: its processor can't be had.
    """
    image_px = config.data.image_size
    if image_px is not None:
        spec.family.check_image_px(spec.facts, image_px)
    # Random weights: the stand-in processor of a registry model, which no hub is needed for.
    planned = config.model_copy(update={"model": config.model.model_copy(update={"random_weights_seed": 0})})
    processor = load_processor(planned, spec)
    spec.family.apply_image_px(None, processor, image_px)
    encoder = Encoder(processor, spec.family, max_length=config.data.max_length)
    sample = _largest_sample(image_px or spec.facts.image_px, config.data.max_length)
    samples = (sample,) * config.training.batch_size
    (batch,) = validation_batches(encoder, samples, batch_size=len(samples))
    return Workload(processor, encoder, samples, batch, min(config.validation.num_generated, len(samples)))


def _largest_sample(image_px: int, max_length: int) -> Sample:
    picture = io.BytesIO()
    Image.new("RGB", (image_px, image_px)).save(picture, "png")
    question = Message("user", (ImagePart(data=picture.getvalue()), TextPart(QUESTION)))
    answer = Message("assistant", (TextPart((WORD * max_length).strip()),))
    return Sample("planned", (question, answer), SourceRef(Path("planned"), 0))
