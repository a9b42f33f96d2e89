"""Frozen weights that a configuration keeps in host memory: which they are, and how they get there and stay there."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from transformers import modeling_utils

from eightgig.core.errors import ConfigError, Problem
from eightgig.memory.arrivals import to_host_as_they_arrive
from eightgig.memory.host_embedding import look_up_on_host
from eightgig.memory.streaming import StreamedWeights, quantised_linears
from eightgig.memory.weight_ring import streamed_positions
from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.config import HardwareConfig
    from eightgig.registry import ModelSpec

EMBEDDING = "hardware.embedding_on_host"
STREAMED = "hardware.streamed_layers"


@contextlib.contextmanager
def leaving_the_gpu(hardware: HardwareConfig, spec: ModelSpec, device: torch.device) -> Iterator[None]:
    """Inside, a model is built or read whose weights for the host leave the GPU as they arrive there.

    transformers reserves the memory of a whole model before it reads one. Inside it does not, since the whole need not
    fit; afterwards it does again.
    """
    if device.type != "cuda" or not (hardware.levers.embedding_on_host or hardware.levers.streamed_layers):
        yield
        return

    def wanted(model: nn.Module) -> Collection[nn.Module]:
        modules = {linear for layer in streamed_layers(hardware, spec, model) for linear in quantised_linears(layer)}
        return modules | set(host_tables(hardware, spec, model))

    with (
        to_host_as_they_arrive(wanted, device),
        mock.patch.object(modeling_utils, "caching_allocator_warmup", return_value=None),
    ):
        yield


def keep_on_host(hardware: HardwareConfig, spec: ModelSpec, model: Any, device: torch.device) -> StreamedWeights | None:
    """Have `model`, frozen and on `device`, work with its weights on the host; the streamed ones, None without any.

    Raises:
        ConfigError: the model has fewer layers, or its head needs the table of embeddings on the GPU.
    """
    for table in host_tables(hardware, spec, model):
        look_up_on_host(table)
        for parameter in table.parameters():
            parameter.on_host = True  # type: ignore[attr-defined]
    layers = streamed_layers(hardware, spec, model)
    return StreamedWeights(layers, device) if layers else None


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
