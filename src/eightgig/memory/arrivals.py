"""Weights that leave the GPU as soon as they arrive there, while a model is built or read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

Wanted = Callable[[nn.Module], Collection[nn.Module]]
"""Of the whole model, once it is built: the modules whose weights are to leave the GPU."""


@contextlib.contextmanager
def to_host_as_they_arrive(wanted: Wanted, device: torch.device) -> Iterator[None]:
    """Inside, the weights of `wanted` are moved to the host one by one as they are set on the model, on `device`.

    Only their packed weights and scales are: what else belongs to a 4-bit weight is small and stays. A weight has
    arrived when it is on `device` and, if its layer is a 4-bit one, quantised. That happens after the whole tree of
    modules is there, which is followed by torch's own hooks of registration while it is built.
    """
    parents: dict[nn.Module, nn.Module] = {}
    chosen: dict[nn.Module, Collection[nn.Module]] = {}  # by the top of the model

    def on_module(parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        if child is not None:
            parents[child] = parent

    def on_parameter(module: nn.Module, _name: str, parameter: Any) -> None:
        if module not in parents:  # its constructor is at work
            return
        if parameter is None or parameter.device.type != device.type or not _has_arrived(module, parameter):
            return
        top = module
        while top in parents:
            top = parents[top]
        if top not in chosen:
            chosen[top] = wanted(top)
        if module in chosen[top]:
            _to_host(parameter)

    hooks = (
        module_hooks.register_module_module_registration_hook(on_module),
        module_hooks.register_module_parameter_registration_hook(on_parameter),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _has_arrived(module: nn.Module, parameter: Any) -> bool:
    """4-bit weights when they are quantised, tables of embeddings at once; nothing else is ever wanted."""
    return getattr(parameter, "quant_state", None) is not None or isinstance(module, nn.Embedding)


def _to_host(parameter: Any) -> None:
    parameter.data = parameter.data.to("cpu")
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state.absmax = state.absmax.to("cpu")
