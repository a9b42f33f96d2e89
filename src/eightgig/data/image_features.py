"""Image inputs from features that were computed before, in place of pixels: no image is decoded for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from eightgig.data.quarantine import ProblemCode, SampleProblem

if TYPE_CHECKING:
    from eightgig.data.feature_store import FeatureStore
    from eightgig.data.sample import ImagePart


class ImageFeatures:
    """What an `Encoder` asks for a sample's image inputs instead of processing its images. Picklable."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def inputs_of(self, parts: Sequence[ImagePart]) -> tuple[Mapping[str, Tensor], list[str]]:
        """The image inputs of `parts`, laid end to end along dimension 0, and what each one's placeholder becomes.

        Raises SampleProblem where the file of an image has changed since its features were computed.
        """
        images = []
        for part in parts:
            key = image_key(part)
            if key not in self._store:
                raise SampleProblem(
                    ProblemCode.BROKEN_IMAGE, f"{part} is not the file any more whose features were computed"
                )
            try:
                images.append(self._store.get(key))
            except (OSError, SafetensorError) as error:
                raise SampleProblem(
                    ProblemCode.MISSING_FILE, f"the kept features of {part} can't be read: {error}"
                ) from error
        inputs = {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs}
        return inputs, [image.placeholder for image in images]


def image_key(part: ImagePart) -> str:
    """SHA-256 of an image file's bytes. Raises SampleProblem where it can't be read."""
    if part.path is None:
        return hashlib.sha256(part.data or b"").hexdigest()
    try:
        with part.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SampleProblem(ProblemCode.MISSING_FILE, f"{part} can't be read: {error.strerror}") from error
