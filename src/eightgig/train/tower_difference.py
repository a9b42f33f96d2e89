"""What a run's vision tower in 4 bits makes of its own images, beside the same tower in 16 bits: for the receipt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from eightgig.core.errors import DoesNotFit
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.memory.cached_tower import tower_of
from eightgig.models.load import LoadedModel
from eightgig.models.tower_in_4bit import Originals, tower_difference
from eightgig.train.events import TrainingListener
from eightgig.train.image_features import ANY_LENGTH, FeaturePlace, encoded_image
from eightgig.train.run import DataSets

NUM_IMAGES = 8  # the first of the training data: enough to tell a usual error from one image's, seconds at full size


def measure_tower(
    loaded: LoadedModel,
    originals: Originals,
    encoder: Encoder,
    data: DataSets,
    place: FeaturePlace,
    listener: TrainingListener,
) -> None:
    """Put the difference of the features into the receipt of `loaded`, say it, and let go of the `originals`.

    Nothing is done where there are none: the tower is in 16 bits.

    Raises:
        DoesNotFit: the GPU's memory does not suffice for one image.
        DataError: an image that was good when it was checked can't be read any more.
    """
    if not originals:
        return
    tower = tower_of(loaded.model, loaded.spec.family)
    home = next(tower.parameters()).device  # the host, where its features are going to be kept
    try:
        with place.meter.phase("features"), place.compute.autocast():
            tower.to(place.compute.device)
            difference = tower_difference(loaded, originals, _images(encoder, data, place))
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            "the GPU ran out of memory while the vision tower in 4 bits was compared with that in 16 bits",
            expected="room for one image in the vision tower, and for one layer of it in 16 bits",
            next_step="lower data.image_size, close other programs on the GPU, or raise hardware.cap_gib",
        ) from error
    tower.to(home)
    originals.clear()
    loaded.receipt = replace(loaded.receipt, tower_difference=difference)
    text = "no image to compare it with"
    if difference is not None:
        mean, worst = difference.mean_relative_error, difference.worst_relative_error
        text = (
            f"its features differ from those in 16 bits by {100 * mean:.2f} % on average, {100 * worst:.2f} % at worst"
        )
    listener.on_message(f"vision tower in 4 bits: {text}")


def _images(encoder: Encoder, data: DataSets, place: FeaturePlace) -> Iterator[Mapping[str, Any]]:
    """The inputs of the first images of the data, each once and by itself, on the device."""
    whole = Encoder(encoder.processor, encoder.family, max_length=ANY_LENGTH)
    parts = dict.fromkeys(part for sample in (*data.train, *data.validation) for part in sample.images)
    for part in itertools.islice(parts, NUM_IMAGES):
        batch = collate([encoded_image(whole, part)], encoder.pad_token_id, encoder.image_layout)
        yield batch.to(place.compute.device, place.compute.input_dtype).model_inputs
