"""How much a vision tower's features change when it is stored in 4 bits: its 16-bit weights kept aside, and compared.

The 16-bit weights wait in the host's memory. To compute with them, one layer's at a time is on the device, as one
layer's unpacked weight is in any pass through the 4-bit tower: the comparison takes no more of the GPU than a training
step does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

import bitsandbytes as bnb
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers import HfQuantizer

from eightgig.memory.cached_tower import tower_features, tower_of
from eightgig.models.quantization import tower_is_4bit
from eightgig.models.receipt import TowerDifference

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.models.load import LoadedModel
    from eightgig.registry import ModelSpec

Originals = dict[nn.Module, Tensor]
"""4-bit layers and their weights as they were before: [out, in], on the host."""


@contextlib.contextmanager
def tower_weights_kept(config: TrainingConfig, spec: ModelSpec) -> Iterator[Originals]:
    """Inside, a model is built or read; of its vision tower's layers that are quantised, the weights are kept.

    They go to the host one by one, before each is quantised. Of a tower that stays in 16 bits nothing is kept.
    """
    kept: Originals = {}
    if not tower_is_4bit(config, spec):
        yield kept
        return
    layers: set[nn.Module] = set()
    prepare, quantise = HfQuantizer.preprocess_model, bnb.nn.Params4bit._quantize

    def preprocess_model(quantizer: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        prepare(quantizer, model, *args, **kwargs)
        modules = tower_of(model, spec.family).modules()
        layers.update(module for module in modules if isinstance(module, bnb.nn.Linear4bit))

    def _quantize(parameter: Any, device: Any) -> Any:
        if parameter.module in layers:
            kept[parameter.module] = parameter.data.to("cpu", copy=True)
        return quantise(parameter, device)

    with (
        mock.patch.object(HfQuantizer, "preprocess_model", preprocess_model),
        mock.patch.object(bnb.nn.Params4bit, "_quantize", _quantize),
    ):
        yield kept


def tower_difference(
    loaded: LoadedModel, originals: Mapping[nn.Module, Tensor], images: Iterable[Mapping[str, Any]]
) -> TowerDifference | None:
    """The features of each of `images` with the tower as it is, beside those with its `originals`; None without images.

    Adapters count on both sides: at the start of a run they change nothing.

    Args:
        loaded: a model whose tower is in 4 bits.
        originals: from `tower_weights_kept`.
        images: the inputs of one image each, as a batch, on the model's device.
    """
    errors, cosines = [], []
    for inputs in images:
        found = tower_features(loaded.model, loaded.spec.family, inputs).cpu().double()
        with _computing_with(originals):
            wanted = tower_features(loaded.model, loaded.spec.family, inputs).cpu().double()
        norm = wanted.norm()
        errors.append(float((found - wanted).norm() / norm))
        cosines.append(float((found * wanted).sum() / (found.norm() * norm)))
    if not errors:
        return None
    return TowerDifference(
        num_images=len(errors),
        mean_relative_error=sum(errors) / len(errors),
        worst_relative_error=max(errors),
        mean_cosine=sum(cosines) / len(cosines),
        worst_cosine=min(cosines),
    )


@contextlib.contextmanager
def _computing_with(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Inside, these layers compute with `weights`, each of which is on their device only while it is at work."""
    forwards = {layer: vars(layer).get("forward") for layer in weights}
    for layer, weight in weights.items():
        vars(layer)["forward"] = functools.partial(_linear, layer, weight)
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def _linear(layer: Any, weight: Tensor, values: Tensor) -> Tensor:
    """What a 16-bit linear layer makes of `values` [..., in]: [..., out], in their dtype."""
    bias = None if layer.bias is None else layer.bias.to(values.dtype)
    return functional.linear(values, weight.to(values.device, values.dtype), bias)
