"""Which streamed layer's weights lie in which of the GPU's buffers, and when they are sent for.

The k-th streamed layer always uses buffer k mod NUM_SLOTS. So a layer's weights, once in place, are where its
operations know them to be, in the forward pass, when it is computed again and in the backward pass: bitsandbytes keeps
a weight on its `ctx`, outside of what autograd saves, and would else read there what has come since.

When a layer begins, forward or backward, its weights must have arrived, and the next one's are sent for. These go into
the buffer of the layer before, all of whose work was issued by then; so that it is enough to wait for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

NUM_SLOTS = 2  # one is computed with while the other is filled


class Carrier(Protocol):
    """What brings weights into the buffers."""

    def start(self, layer: int, slot: int) -> None:
        """Begin to bring the weights of streamed layer `layer` into buffer `slot`, when the work issued so far is done.

        The work issued until the next `finish` goes on meanwhile.
        """

    def finish(self, slot: int) -> None:
        """Let the work that is issued from now on wait until what was started last for `slot` has arrived."""


class WeightRing:
    """The buffers and what they hold."""

    def __init__(self, num_layers: int, carrier: Carrier) -> None:
        self._num_layers = num_layers
        self._carrier = carrier
        self._held: list[int | None] = [None] * min(NUM_SLOTS, num_layers)

    def enter(self, layer: int, following: int | None) -> None:
        """Have the weights of `layer` in place for the work to come, and send for those of `following`.

        All work with the weights of other layers must have been issued.
        """
        self._bring(layer)
        self._carrier.finish(self._slot(layer))
        if following is not None and self._slot(following) != self._slot(layer):
            self._bring(following)

    def enter_forward(self, layer: int) -> None:
        """`enter` for a forward pass. With gradients the last layer is also the first of the backward pass; without
        them another forward pass may follow.
        """
        following = layer + 1
        if following == self._num_layers:
            self.enter(layer, None if torch.is_grad_enabled() else 0)
        else:
            self.enter(layer, following)

    def enter_backward(self, layer: int) -> None:
        """`enter` for a backward pass, which visits the layers in reverse."""
        self.enter(layer, layer - 1 if layer else None)

    def _slot(self, layer: int) -> int:
        return layer % len(self._held)

    def _bring(self, layer: int) -> None:
        slot = self._slot(layer)
        if self._held[slot] != layer:
            self._held[slot] = None  # a copy that fails leaves neither
            self._carrier.start(layer, slot)
            self._held[slot] = layer


def streamed_positions(num_layers: int, num_streamed: int) -> tuple[int, ...]:
    """Which of `num_layers` layers are streamed: spread evenly, the last one among them.

    While one layer's weights travel, the GPU computes the layers up to the next streamed one. Evenly spread, each
    transfer has the same time to hide in; were the last ones streamed, the first layers' time would hide nothing.

    Raises:
        ValueError: there are not so many layers.
    """
    if not 0 <= num_streamed <= num_layers:
        raise ValueError(f"{num_streamed} streamed layers of {num_layers}")
    return tuple(i for i in range(num_layers) if (i + 1) * num_streamed // num_layers > i * num_streamed // num_layers)


def follow(layers: Sequence[nn.Module], ring: WeightRing) -> list[RemovableHandle]:
    """Tell `ring` whenever one of `layers`, in the order of the forward pass, begins its forward or backward pass.

    The hooks are those of `Module.__call__`, outside of whatever wraps a layer's forward: with activation checkpointing
    a layer is computed again within its backward pass.
    """
    handles: list[RemovableHandle] = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(_before_forward(ring, index)))
        handles.append(layer.register_forward_hook(_before_backward(ring, index)))
    return handles


def _before_forward(ring: WeightRing, index: int) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        ring.enter_forward(index)

    return hook


def _before_backward(ring: WeightRing, index: int) -> Callable[..., None]:
    """The gradient of a layer's output is there before any of the layer's own nodes is called."""

    def began(index: int, gradient: Tensor) -> None:
        ring.enter_backward(index)

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(functools.partial(began, index))  # type: ignore[no-untyped-call]

    return hook
