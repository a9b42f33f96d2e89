"""Weights that leave the GPU as soon as they arrive there, while a model is built or read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

Wanted = Callable[[nn.Module], Mapping[nn.Module, Collection[nn.Module]]]
"""Of the whole model, once it is built: the modules whose weights are to leave the GPU, by the module that they are
parts of."""


@contextlib.contextmanager
def to_host_as_they_arrive(
    wanted: Wanted, device: torch.device, when_whole: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Inside, the weights of `wanted` are moved to the host one by one as they are set on the model, on `device`.

    Of a 4-bit layer only the packed weight and its scales are: what else belongs to it is small and stays. A weight has
    arrived when it is on `device` and, if its layer is a 4-bit one, quantised. That happens after the whole tree of
    modules is there, which is followed by torch's own hooks of registration while it is built.

    Args:
        wanted: see there.
        device: where weights arrive.
        when_whole: called with a module of `wanted` once each of its parts has a weight on the host: before the next
            weight is set, or at the end.
    """
    arrivals = _Arrivals(wanted, device, when_whole)
    hooks = (
        module_hooks.register_module_module_registration_hook(arrivals.on_module),
        module_hooks.register_module_parameter_registration_hook(arrivals.on_parameter),
    )
    try:
        yield
        arrivals.hand_on()
    finally:
        for hook in hooks:
            hook.remove()


class _Arrivals:
    """What has arrived so far."""

    def __init__(self, wanted: Wanted, device: torch.device, when_whole: Callable[[nn.Module], None]) -> None:
        self._wanted, self._device, self._when_whole = wanted, device, when_whole
        self._parents: dict[nn.Module, nn.Module] = {}
        self._owners: dict[nn.Module, dict[nn.Module, nn.Module]] = {}  # of each wanted part, by the top of the model
        self._missing: dict[nn.Module, set[nn.Module]] = {}  # parts, by owner
        self._whole: list[nn.Module] = []

    def on_module(self, parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        """To be called when a module is set on another."""
        if child is not None:
            self._parents[child] = parent

    def on_parameter(self, module: nn.Module, _name: str, parameter: Any) -> None:
        """To be called when a weight is about to be set."""
        self.hand_on()
        if module not in self._parents:  # its constructor is at work
            return
        if parameter is None or parameter.device.type != self._device.type or not _has_arrived(module, parameter):
            return
        owner = self._owner(module)
        if owner is None:
            return
        _to_host(parameter)
        self._missing[owner].discard(module)
        if not self._missing[owner]:
            self._whole.append(owner)

    def hand_on(self) -> None:
        """Tell what is whole. Its last weight was set after `on_parameter` had been called for it."""
        while self._whole:
            self._when_whole(self._whole.pop())

    def _owner(self, module: nn.Module) -> nn.Module | None:
        top = module
        while top in self._parents:
            top = self._parents[top]
        if top not in self._owners:
            parts = self._wanted(top)
            self._owners[top] = {part: owner for owner, of_owner in parts.items() for part in of_owner}
            self._missing |= {owner: set(of_owner) for owner, of_owner in parts.items()}
        return self._owners[top].get(module)


def _has_arrived(module: nn.Module, parameter: Any) -> bool:
    """Weights of 4-bit layers when they are quantised, their biases never; all else at once."""
    return getattr(parameter, "quant_state", None) is not None or not isinstance(module, bnb.nn.Linear4bit)


def _to_host(parameter: Any) -> None:
    parameter.data = parameter.data.to("cpu")
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state.absmax = state.absmax.to("cpu")
