"""The image features of a run: missing ones computed, which is all the tower is for; batches fed with them."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator

from eightgig.core.errors import DataError, DoesNotFit
from eightgig.core.files import existing_parent, write_json
from eightgig.core.units import GIB, format_bytes
from eightgig.core.user_cache import cache_folder
from eightgig.data.batch import EncodedSample
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.data.feature_store import FeatureStore, StoredImage, stored_bytes
from eightgig.data.image_features import ImageFeatures, image_key
from eightgig.data.images import image_size
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import ImagePart, Message, Sample, TextPart
from eightgig.memory.cached_tower import PIXELS, FedModel, rows_of_features, tower_features, tower_of
from eightgig.models.load import LoadedModel
from eightgig.models.tower_features import SETTING, check_tower_is_fixed, facts_key, tower_facts
from eightgig.step.step import Compute
from eightgig.train.events import TrainingListener
from eightgig.train.memory_meter import MemoryMeter

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig

Value = TypeVar("Value")

FOLDER = "features"  # below the user's cache folder
FACTS_FILE = "tower.json"
FILE_BYTES = 256 * 2**20  # held in RAM until they are written: few files, and little lost with an interrupted run
SECONDS_BETWEEN_MESSAGES = 5.0
QUESTION = "?"  # words beside an image; the tower never sees them
ANY_LENGTH = 1 << 20  # tokens; nothing is cut


@dataclass(frozen=True)
class FeaturePlace:
    """Where a run's features are computed: device and dtypes, what measures its memory, and its processes."""

    compute: Compute
    meter: MemoryMeter
    accelerator: Accelerator

    def wait_for_everyone(self) -> None:
        """Return once every process has come here."""
        self.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class FedRun:
    """A run whose model takes features.

    Attributes:
        encoder: makes batches with features.
        pixel_encoder: makes batches with pixels.
        model: takes features until its tower is taken back.
    """

    encoder: Encoder
    pixel_encoder: Encoder
    model: FedModel

    def take_tower_back(self, device: torch.device) -> None:
        """Put the tower back on `device` and in its place: the model takes pixels again."""
        self.model.tower.to(device)
        self.model.take_back()


class FeatureCache:
    """The kept features of one tower, and what computes those that are missing."""

    def __init__(
        self,
        config: TrainingConfig,
        loaded: LoadedModel,
        encoder: Encoder,
        place: FeaturePlace,
        listener: TrainingListener,
    ) -> None:
        """Find the folder that belongs to the tower of `loaded`, the processor of `encoder`, and the numerics.

        The tower may lie on the host. It comes to the device of `place` when features are missing, and only then.

        Raises:
            ConfigError, UnsupportedModel: the tower's features are not the same in every step.
        """
        check_tower_is_fixed(loaded.model, loaded.spec)
        self._config, self._loaded, self._encoder = config, loaded, encoder
        self._place, self._listener = place, listener
        compute = place.compute
        self._facts = tower_facts(
            loaded, encoder.processor, compute.device, compute.input_dtype, compute.autocast_dtype
        )
        self._root = cache_folder() / FOLDER
        self.store = FeatureStore(self._root / facts_key(self._facts))

    def fill(self, samples: Iterable[Sample]) -> None:
        """Compute the features of those images of `samples` that are not kept yet: this process's share of them.

        Raises:
            DoesNotFit: they would take more room than there is, or the GPU's memory does not suffice.
            DataError: an image that was good when it was checked can't be read any more.
        """
        say = self._listener.on_message
        images = _images_by_key(samples)
        if self._place.accelerator.is_main_process:
            self.store.look(say)
            self.store.verify(images, say)
        self._place.wait_for_everyone()  # what was damaged is gone: all processes miss the same
        self.store.look(say)
        missing = [(key, part) for key, part in images.items() if key not in self.store]
        say(f"image features: {len(images):,} images, {len(images) - len(missing):,} of them kept from before")
        own = missing[self._place.accelerator.process_index :: self._place.accelerator.num_processes]
        if own:
            self._compute(own, missing)

    def feed(self) -> FedRun:
        """Have the model take features in place of pixels, and its tower off the card if it is there."""
        self.store.look(self._listener.on_message)  # other processes have written too
        fed = FedModel(self._loaded.model, self._loaded.spec.family)
        fed.tower.to("cpu")
        if self._place.compute.device.type == "cuda":
            torch.cuda.empty_cache()
        features = ImageFeatures(self.store)
        return FedRun(self._encoder.with_image_features(features), self._encoder, fed)

    def _compute(self, own: Sequence[tuple[str, ImagePart]], missing: Sequence[tuple[str, ImagePart]]) -> None:
        encoder = Encoder(self._encoder.processor, self._encoder.family, max_length=ANY_LENGTH)
        pending: dict[str, StoredImage] = {}
        num_done, last_message = 0, time.monotonic()
        self._bring_tower()
        for group in _groups(own, self._config.training.batch_size):
            computed = self._features_of(encoder, group)
            if not num_done:
                self._check_room(computed, dict(group), missing)
                write_json(self.store.folder / FACTS_FILE, self._facts)
            pending |= computed
            num_done += len(group)
            if sum(image.num_bytes for image in pending.values()) >= FILE_BYTES or num_done == len(own):
                self.store.add(pending)
                pending = {}
            if time.monotonic() - last_message > SECONDS_BETWEEN_MESSAGES:
                last_message = time.monotonic()
                self._listener.on_message(f"image features: computed {num_done:,} of {len(own):,}")

    def _bring_tower(self) -> None:
        """Have the tower on the device that computes."""
        with self._explained(), self._place.meter.phase("features"):
            tower_of(self._loaded.model, self._loaded.spec.family).to(self._place.compute.device)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            batch_size = self._config.training.batch_size
            raise DoesNotFit(
                f"the GPU ran out of memory while the features of {batch_size} images at a time were computed",
                expected="room for the model with its vision tower, before training",
                next_step=f"lower training.batch_size or data.image_size, or set {SETTING} to false",
            ) from error

    def _features_of(self, encoder: Encoder, group: Sequence[tuple[str, ImagePart]]) -> dict[str, StoredImage]:
        """The features of a few images, computed together, by key."""
        family, processor = encoder.family, encoder.processor
        encoded = [encoded_image(encoder, part) for _, part in group]
        batch = collate(encoded, encoder.pad_token_id, encoder.image_layout)
        compute = self._place.compute
        with self._explained(), self._place.meter.phase("features"), compute.autocast():
            inputs = batch.to(compute.device, compute.input_dtype).model_inputs
            features = tower_features(self._loaded.model, family, inputs).cpu()
        pixel_rows = [len(sample.image_inputs[PIXELS]) for sample in encoded]
        sizes = [rows_of_features(len(features), sum(pixel_rows), rows) for rows in pixel_rows]
        of_question = family.prompt_inputs(processor, QUESTION, 1)
        images = {}
        for (key, _), sample, own in zip(group, encoded, torch.split(features, sizes), strict=True):
            inputs = {name: value for name, value in sample.image_inputs.items() if name not in of_question}
            (placeholder,) = family.expand_placeholders(processor, inputs, 1)
            images[key] = StoredImage({**inputs, PIXELS: own.clone()}, placeholder)
        return images

    def _check_room(
        self,
        computed: Mapping[str, StoredImage],
        parts: Mapping[str, ImagePart],
        missing: Sequence[tuple[str, ImagePart]],
    ) -> None:
        """Raise DoesNotFit where the features of all `missing` don't fit, by what the `computed` ones take a token."""
        computed_bytes = sum(image.num_bytes for image in computed.values())
        tokens = {key: self._num_tokens(part) for key, part in missing}
        needed_bytes = computed_bytes * sum(tokens.values()) // sum(tokens[key] for key in parts)
        used_bytes, limit_gib = stored_bytes(self._root), self._config.hardware.feature_cache_gib
        free_bytes = shutil.disk_usage(existing_parent(self._root)).free
        what = f"the features of {len(missing):,} images take {format_bytes(needed_bytes)}"
        if limit_gib is not None and used_bytes + needed_bytes > limit_gib * GIB:
            raise DoesNotFit(
                f"{what}, and {self._root} holds {format_bytes(used_bytes)} already",
                expected=f"at most hardware.feature_cache_gib = {limit_gib:g} in all",
                next_step=f"raise it, delete folders in {self._root} (each has a {FACTS_FILE} that says whose features "
                f"they are), or set {SETTING} to false",
            )
        if needed_bytes > free_bytes:
            raise DoesNotFit(
                f"{what}, and the disk of {self._root} has {format_bytes(free_bytes)} free",
                expected="room for all of them",
                next_step=f"free some space, set XDG_CACHE_HOME to a folder on another disk, or set {SETTING} to false",
            )

    def _num_tokens(self, part: ImagePart) -> int:
        width_px, height_px = image_size(part)
        spec = self._loaded.spec
        return spec.family.num_image_tokens(
            spec.facts, self._config.data.image_size, width_px=width_px, height_px=height_px
        )


def feature_room(config: TrainingConfig) -> int:
    """Bytes that may still be kept: what is free on the disk, within `hardware.feature_cache_gib`."""
    root = cache_folder() / FOLDER
    free_bytes = shutil.disk_usage(existing_parent(root)).free
    limit_gib = config.hardware.feature_cache_gib
    return free_bytes if limit_gib is None else min(free_bytes, max(round(limit_gib * GIB) - stored_bytes(root), 0))


def _images_by_key(samples: Iterable[Sample]) -> dict[str, ImagePart]:
    """Each image of `samples` once, by the hash of its file."""
    known: dict[ImagePart, str] = {}
    for sample in samples:
        for part in sample.images:
            if part not in known:
                known[part] = _or_data_error(part, functools.partial(image_key, part))
    return {key: part for part, key in known.items()}


def encoded_image(encoder: Encoder, part: ImagePart) -> EncodedSample:
    """A prompt with the image `part` alone. Raises DataError where it can't be read any more."""
    message = Message("user", (part, TextPart(QUESTION)))
    return _or_data_error(part, functools.partial(encoder.encode_prompt, [message]))


def _or_data_error(part: ImagePart, read: Callable[[], Value]) -> Value:
    """What `read` gives. Raises DataError where the image can't be read any more."""
    try:
        return read()
    except SampleProblem as problem:
        raise DataError(
            f"{part} can't be read any more: {problem.reason}",
            expected="images that stay as they were checked before training",
            next_step="restore the file, or start again so that its samples are set aside",
        ) from problem


def _groups(items: Sequence[tuple[str, ImagePart]], size: int) -> Iterator[Sequence[tuple[str, ImagePart]]]:
    """`items` in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
