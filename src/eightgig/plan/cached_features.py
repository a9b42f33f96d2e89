"""Kept image features in a simulated run: computed with the tower on the card, to which it comes for just that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eightgig.data.batch import MicroBatch
from eightgig.memory.cached_tower import PIXELS, FedModel, rows_of_features, tower_features, tower_of
from eightgig.plan.categories import WEIGHTS_4BIT, WEIGHTS_16BIT
from eightgig.plan.host_memory import HostBatch
from eightgig.plan.parts import weight_tensors
from eightgig.plan.recorder import Recorder
from eightgig.step.step import Compute

if TYPE_CHECKING:
    from eightgig.registry import ModelSpec


class SimulatedFeatures:
    """The model of a simulated run, fed with features from here on.

    Attributes:
        model: takes features until its tower is taken back.
    """

    def __init__(self, model: Any, spec: ModelSpec, batch: MicroBatch, compute: Compute, recorder: Recorder) -> None:
        """Run the tower of `model` on the images of `batch`, recorded, its weights being on the card meanwhile.

        Its tensors are left out of the record (`HostWeights`), so their blocks are written down by themselves.
        """
        blocks = [
            recorder.ledger.alloc(tensor.untyped_storage().nbytes(), category)
            for tensor, category in _weights(tower_of(model, spec.family))
        ]
        with compute.autocast():
            inputs = HostBatch.of(batch).to(compute.device, compute.input_dtype).model_inputs
            features = tower_features(model, spec.family, inputs)
        self._recorder = recorder
        self._num_pixel_rows = len(batch.model_inputs[PIXELS])
        self._features = _on_host(features, len(features), recorder)
        del features, inputs
        self.model = FedModel(model, spec.family)
        for block in blocks:
            recorder.ledger.free(block)

    def num_bytes(self, batch: MicroBatch) -> int:
        """What the features of the images of `batch` take."""
        pixels = batch.model_inputs.get(PIXELS)
        return 0 if pixels is None else self._rows(pixels) * self._features[0].numel() * self._features.element_size()

    def fed(self, batch: MicroBatch) -> MicroBatch:
        """`batch` with features in place of pixels, on the host; one without an image as it is."""
        pixels = batch.model_inputs.get(PIXELS)
        if pixels is None:
            return batch
        features = _on_host(self._features, self._rows(pixels), self._recorder)
        return replace(batch, model_inputs={**batch.model_inputs, PIXELS: features})

    def _rows(self, pixels: Tensor) -> int:
        return rows_of_features(len(self._features), self._num_pixel_rows, len(pixels))


def _on_host(like: Tensor, num_rows: int, recorder: Recorder) -> Tensor:
    with recorder.paused():
        return like.new_empty((num_rows, *like.shape[1:]))


def _weights(tower: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """The tensors of the tower's weights, with their categories."""
    for parameter in tower.parameters():
        is_4bit = getattr(parameter, "quant_state", None) is not None
        for tensor in weight_tensors(parameter):
            yield tensor, WEIGHTS_4BIT if is_4bit else WEIGHTS_16BIT
