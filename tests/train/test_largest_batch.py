"""The micro-batch that is planned is the one with the most tokens, as encoding every sample finds it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import build_tiny_processor, write_image

from eightgig.config import TrainingConfig
from eightgig.data.check import SampleSize
from eightgig.data.encode import Encoder
from eightgig.data.grouping import Grouping
from eightgig.data.loader import validation_batches
from eightgig.data.order import StepOrder
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.plan.workload import workload_sizes
from eightgig.registry import ModelSpec, get
from eightgig.registry.llava import LlavaFamily
from eightgig.train.largest_batch import largest_micro_batch, largest_training_batch
from eightgig.train.run import DataSets

WORDS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_tiny_processor(image_px=32), LlavaFamily(), max_length=24)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("picture") / "a.png")


@pytest.fixture(scope="module")
def spec(encoder: Encoder) -> ModelSpec:
    """LLaVA at 32 px with patches of 8: 16 tokens an image."""
    published = get("llava-1.5-7b").facts
    vision = {**published.architecture["vision_config"], "image_size": 32, "patch_size": 8}
    return ModelSpec(
        LlavaFamily(), replace(published, architecture={**published.architecture, "vision_config": vision}, image_px=32)
    )


def sample(name: str, num_words: int, num_images: int, picture: Path) -> Sample:
    """A sample whose answer has so many words."""
    question = Message("user", (*[ImagePart(path=picture)] * num_images, TextPart("What is shown?")))
    return Sample(name, (question, Message("assistant", (TextPart("bar " * num_words),))), SourceRef(picture, 1))


def data_of(samples: list[Sample], encoder: Encoder, *, num_validation: int = 1) -> DataSets:
    """`samples` as training data, with the sizes that a check finds."""
    sizes = tuple(SampleSize(encoder.measure(each).num_text_tokens, ((40, 30),) * len(each.images)) for each in samples)
    return DataSets(tuple(samples), sizes, tuple(samples[:num_validation]), "", 0, 0, 0, has_images=True)


def order_of(config: TrainingConfig, data: DataSets) -> StepOrder:
    """The order of a run's steps, its samples being as long as their texts and 16 tokens an image."""
    training = config.training
    sizes = [size.num_text_tokens + 16 * len(size.image_sizes_px) for size in data.train_sizes]
    grouping = Grouping(training.batching, training.batch_size, sizes)
    return StepOrder(len(sizes), training.batch_size, training.gradient_accumulation_steps, 0, grouping)


@given(words=WORDS, batch_size=st.integers(1, 4), draw=st.data())
def test_no_other_batch_has_more_tokens(
    words: list[int], batch_size: int, draw: st.DataObject, encoder: Encoder, spec: ModelSpec, picture: Path
) -> None:
    samples = [
        sample(str(index), num_words, draw.draw(st.integers(0, 2)), picture) for index, num_words in enumerate(words)
    ]
    config = TrainingConfig.model_validate({"training": {"batch_size": batch_size}})
    data = data_of(samples, encoder)
    work = largest_training_batch(config, spec, encoder, data, order_of(config, data))
    lengths = sorted((encoder.encode(each).input_ids.numel() for each in samples), reverse=True)[:batch_size]
    assert work.batch.num_tokens == sum(lengths)
    assert len(work.samples) == min(batch_size, len(samples))
    assert work.processor is encoder.processor


@given(words=WORDS, batch_size=st.integers(1, 4), draw=st.data())
def test_no_row_is_longer_than_the_planned_one_nor_has_more_images(
    words: list[int], batch_size: int, draw: st.DataObject, encoder: Encoder, spec: ModelSpec, picture: Path
) -> None:
    """Against every set of samples that may share a row. One sample more of images may be: none fits into the rest."""
    samples = [sample(str(i), num_words, draw.draw(st.integers(0, 2)), picture) for i, num_words in enumerate(words)]
    training = {"batch_size": batch_size, "gradient_accumulation_steps": 2, "batching": "packed"}
    config = TrainingConfig.model_validate({"training": training})
    data = data_of(samples, encoder)
    order = order_of(config, data)
    work = largest_training_batch(config, spec, encoder, data, order)
    encoded = [encoder.encode(each) for each in samples]
    lengths = [each.input_ids.numel() for each in encoded]
    longest = sum(sorted(lengths, reverse=True)[:batch_size])
    possible = [
        row
        for size in range(1, len(samples) + 1)
        for row in itertools.combinations(range(len(samples)), size)
        if sum(lengths[index] for index in row) <= longest
    ]
    most_images = max(sum(encoded[index].num_images for index in row) for row in possible)
    assert work.batch.num_tokens == work.batch.num_computed_tokens == longest
    assert most_images - 2 <= work.batch.num_images <= most_images
    assert work.validation is not None
    assert work.validation.batch.num_tokens == longest
    rows = [row for step in range(order.steps_per_epoch) for row in order.micro_batches(step)]
    assert all(sum(lengths[index] for index in row) <= longest for row in rows)
    assert work.num_micro_batches == len(rows) / order.steps_per_epoch
    sizes = workload_sizes(work)
    assert sizes["num_image_tokens"] == 16 * work.batch.num_images
    assert sizes["num_text_tokens"] == longest - sizes["num_image_tokens"]


@given(words=WORDS, batch_size=st.integers(1, 4), accumulation=st.integers(1, 3), first=st.integers(0, 5))
def test_no_other_micro_batch_to_come_has_more_tokens(
    words: list[int], batch_size: int, accumulation: int, first: int, encoder: Encoder, spec: ModelSpec, picture: Path
) -> None:
    data = data_of([sample(str(n), num_words, n % 3, picture) for n, num_words in enumerate(words)], encoder)
    order, steps = StepOrder(len(words), batch_size, accumulation, seed=5), range(first, first + 4)

    def padded(indices: list[int]) -> int:
        (batch,) = validation_batches(encoder, [data.train[index] for index in indices], batch_size=len(indices))
        return batch.labels.numel()

    found = largest_micro_batch(TrainingConfig(), spec, data, order, steps)
    to_come = [indices for step in steps for indices in order.micro_batches(step)]
    assert found in to_come
    assert padded(found) == max(map(padded, to_come))


@pytest.mark.parametrize(("num_validation", "wanted", "num_generated"), [(1, 8, 2), (1, 1, 1), (1, 0, 0), (0, 8, 0)])
def test_as_many_answers_as_validation_asks_for_at_once(
    num_validation: int, wanted: int, num_generated: int, encoder: Encoder, spec: ModelSpec, picture: Path
) -> None:
    config = TrainingConfig.model_validate({"training": {"batch_size": 2}, "validation": {"num_generated": wanted}})
    samples = [sample(str(index), 3, 1, picture) for index in range(3)]
    data = data_of(samples, encoder, num_validation=num_validation)
    work = largest_training_batch(config, spec, encoder, data, order_of(config, data))
    assert work.num_generated == num_generated
