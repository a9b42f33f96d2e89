"""PEFT's LoRA layers of a decoder layer, computed together where they share an input (`kernels.lora_linears`).

The forward of each instance is wrapped. PEFT's own stays inside it, and computes whatever is not plain training:
without gradients (validation, answers, export), adapters that are disabled, merged, several or of another kind,
dropout that is at work, and dtypes other than the layer computes in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from eightgig.kernels.lora_linears import LoraLinear, lora_linears

COMPUTED_IN = frozenset({torch.bfloat16, torch.float32, torch.float64})
"""fp16 is left to PEFT, whose adapters compute in fp32: what they make may leave its range."""

_BASES = {Linear4bit: bnb.nn.Linear4bit, Linear: nn.Linear}


def fuse_lora(layer: nn.Module, shared: Sequence[Sequence[nn.Module]]) -> None:
    """Wrap the forward of every LoRA layer in `layer`, on that instance.

    Args:
        layer: a decoder layer. LoRA layers of a kind that is not known stay as they are.
        shared: modules of it that are called with the same tensor, in the order of their calls; the others are
            computed by themselves.
    """
    groups = [[module for module in group if _is_known(module)] for group in shared]
    grouped = {module for group in groups for module in group}
    groups += [[module] for module in layer.modules() if _is_known(module) and module not in grouped]
    for members in groups:
        group = _Group(members)
        for place, member in enumerate(members):
            member.forward = group.wrapped(place)


def _is_known(module: Any) -> bool:
    """Whether `module` is a LoRA layer over a plain linear one, both with the forward of their classes."""
    if type(module) not in _BASES or "forward" in vars(module):
        return False
    base = module.get_base_layer()
    return type(base) is _BASES[type(module)] and "forward" not in vars(base)


class _Group:
    """LoRA layers that are called with one tensor: the first computes for all, the others pick up their outputs."""

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = members
        self._own: list[Callable[..., Tensor]] = [member.forward for member in members]
        self._waiting: dict[int, Tensor] = {}
        self._hidden: Tensor | None = None
        self._version = 0
        self._is_shared = len(members) > 1

    def wrapped(self, place: int) -> Callable[..., Tensor]:
        """The forward of the member at `place`."""

        @functools.wraps(self._own[place])
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not place:
                self._let_go()  # of what a pass that failed has left
            elif self._is_shared:
                output = self._waiting_for(place, x)
                if output is not None:
                    return output
            if args or kwargs or not _is_training(x):
                return self._own[place](x, *args, **kwargs)
            return self._computed(place, x)

        return forward

    def _waiting_for(self, place: int, hidden: Tensor) -> Tensor | None:
        """What was computed of `hidden` for the member at `place`, None where nothing was."""
        if self._hidden is None:
            return None
        if hidden is not self._hidden or hidden._version != self._version:
            self._let_go()
            self._is_shared = False  # a model whose code is not as it was told: each by itself from here on
            return None
        output = self._waiting.pop(place, None)
        if not self._waiting:
            self._let_go()
        return output

    def _let_go(self) -> None:
        self._waiting, self._hidden = {}, None

    def _computed(self, place: int, hidden: Tensor) -> Tensor:
        """The output of the member at `place`; the first one's call makes those of the others, too."""
        members = self._members if self._is_shared and not place else [self._members[place]]
        linears = list(_linears(members, hidden))
        if len(linears) < len(members):
            return self._own[place](hidden)
        output, *others = lora_linears(hidden, linears)
        if others:
            self._waiting, self._hidden, self._version = dict(enumerate(others, 1)), hidden, hidden._version
        return output


def _is_training(hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and hidden.dtype in COMPUTED_IN and not torch.is_autocast_enabled(hidden.device.type)


def _linears(members: Sequence[Any], hidden: Tensor) -> Iterator[LoraLinear]:
    """Of those of `members` that compute as LoRA does, the layer and the adapter at work."""
    for member in members:
        if member.disable_adapters or member.merged_adapters or len(member.active_adapters) != 1:
            continue
        name = member.active_adapters[0]
        if name not in member.lora_A or name in member.lora_variant or member.lora_bias[name]:
            continue
        dropout = member.lora_dropout[name]
        if member.training and getattr(dropout, "p", 0.0) > 0:
            continue
        base = member.get_base_layer()
        if _compute_dtype(base) not in (None, hidden.dtype):
            continue
        down, up = member.lora_A[name].weight, member.lora_B[name].weight
        yield LoraLinear(base, down, up, member.scaling[name])


def _compute_dtype(base: Any) -> torch.dtype | None:
    """What a frozen layer computes in; None: whatever it is given."""
    dtype: torch.dtype | None = base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
    return dtype
