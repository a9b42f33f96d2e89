"""Frozen weights that a configuration keeps in host memory: which they are, and how they get there and stay there."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from transformers import modeling_utils

from eightgig.core.errors import ConfigError, Problem
from eightgig.memory.arrivals import to_host_as_they_arrive
from eightgig.memory.cached_tower import tower_of
from eightgig.memory.freed_memory import give_back_freed_memory
from eightgig.memory.host_embedding import look_up_on_host
from eightgig.memory.packed_layers import PackedLayer, quantised_linears
from eightgig.memory.streaming import StreamedWeights
from eightgig.memory.weight_ring import streamed_positions
from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.config import HardwareConfig
    from eightgig.registry import ModelSpec

EMBEDDING = "hardware.embedding_on_host"
STREAMED = "hardware.streamed_layers"


@contextlib.contextmanager
def leaving_the_gpu(
    hardware: HardwareConfig, spec: ModelSpec, device: torch.device, *, with_tower: bool = False
) -> Iterator[dict[nn.Module, PackedLayer]]:
    """Inside, a model is built or read whose weights for the host leave the GPU as they arrive there.

    A streamed layer is packed as soon as it is whole, so that host memory holds no layer's weights twice but one's.
    What it is packed into is found in the yielded dict, by the layer. On the CPU, which stands in for a GPU, too.
    `with_tower`: the weights of the tower whose features are kept leave as well; small parts of it stay.

    transformers reserves the memory of a whole model before it reads one. Inside it does not, since the whole need not
    fit; afterwards it does again.
    """
    packed: dict[nn.Module, PackedLayer] = {}
    if not (hardware.levers.embedding_on_host or hardware.levers.streamed_layers or with_tower):
        yield packed
        return
    layers: set[nn.Module] = set()

    def wanted(model: nn.Module) -> Mapping[nn.Module, Collection[nn.Module]]:
        layers.update(streamed_layers(hardware, spec, model))
        parts: dict[nn.Module, Collection[nn.Module]] = {layer: quantised_linears(layer) for layer in layers}
        parts |= {table: [table] for table in host_tables(hardware, spec, model)}
        if with_tower:
            tower = tower_of(model, spec.family)
            parts[tower] = list(tower.modules())
        return parts

    def when_whole(module: nn.Module) -> None:
        if module in layers:
            packed[module] = PackedLayer(module, device)
            give_back_freed_memory()  # the pieces'; else it would lie in holes until the model is whole

    with (
        to_host_as_they_arrive(wanted, device, when_whole),
        mock.patch.object(modeling_utils, "caching_allocator_warmup", return_value=None),
    ):
        yield packed


def keep_on_host(
    hardware: HardwareConfig,
    spec: ModelSpec,
    model: Any,
    device: torch.device,
    packed: Mapping[nn.Module, PackedLayer] = MappingProxyType({}),
) -> StreamedWeights | None:
    """Have `model`, frozen and on `device`, work with its weights on the host; the streamed ones, None without any.

    `packed` are the layers that were packed while the model was loaded, as `leaving_the_gpu` gave them.

    Raises:
        ConfigError: the model has fewer layers, or its head needs the table of embeddings on the GPU.
    """
    for table in host_tables(hardware, spec, model):
        look_up_on_host(table)
        for parameter in table.parameters():
            parameter.on_host = True  # type: ignore[attr-defined]
    layers = streamed_layers(hardware, spec, model)
    return StreamedWeights(layers, device, packed) if layers else None


def host_tables(hardware: HardwareConfig, spec: ModelSpec, model: Any) -> list[nn.Module]:
    """The tables of embeddings that `hardware` keeps on the host.

    Raises:
        ConfigError: one of them is the head's weight too. It would stay on the GPU for that, and nothing be saved.
    """
    if not hardware.levers.embedding_on_host:
        return []
    tables = list(spec.family.host_tables(model))
    head = base_model(model).get_submodule(spec.family.modules.lm_head)
    if any(table.weight is head.weight for table in tables):
        raise ConfigError(
            [Problem(EMBEDDING, "true", f"false for {spec.name}: its head computes with the same table on the GPU")],
            source="model",
            next_step=f"set {EMBEDDING} to false; nothing would be saved here",
        )
    return tables


def streamed_layers(hardware: HardwareConfig, spec: ModelSpec, model: Any) -> list[nn.Module]:
    """The decoder layers that `hardware` streams, in their order.

    Raises:
        ConfigError: there are fewer.
    """
    wanted = hardware.levers.streamed_layers
    if not wanted:
        return []
    layers: Sequence[nn.Module] = spec.family.decoder_layers(model)
    if wanted > len(layers):
        allowed = f"at most {len(layers)}, the decoder layers of {spec.name}"
        raise ConfigError(
            [Problem(STREAMED, str(wanted), allowed)],
            source="model",
            next_step=f"lower {STREAMED}; `eightgig plan` finds how many are needed",
        )
    return [layers[i] for i in streamed_positions(len(layers), wanted)]
