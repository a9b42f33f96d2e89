"""Layer inputs wait in the host's memory: what checkpointed layers keep, from their forward pass to their backward.

A layer's input leaves while the layer computes. It comes back while the layer behind it, which the backward pass meets
first, is computed again: two of them are on the card at any time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eightgig.core.units import MIB
from eightgig.memory.host_copies import HostCopy, Transfers, transfers_of

# 1 MiB crosses PCIe (7.8 GB/s on an RTX 4060, issue 5) in 0.13 ms, about what the CPU needs to issue the copy both ways
# with its waits; less than that hides nothing. A whole model of such inputs takes less than 100 MiB.
MIN_OFFLOADED_BYTES = 1 * MIB


class _Kept:
    """A layer's input, as the graph keeps it.

    Attributes:
        tensor: where it lies on the device, None while it doesn't.
        copy: the one on the host; None where it never left.
        before: the one that is needed next: of the layer before, or of the group of rows before in the same layer.
        is_first: whether its layer is the first.
    """

    def __init__(self, before: weakref.ref[_Kept] | None, *, is_first: bool) -> None:
        self.tensor: Tensor | None = None
        self.copy: HostCopy | None = None
        self.before = before
        self.is_first = is_first


class LayerInputs:
    """Keeps the inputs of one model's checkpointed layers, and hands them back last first."""

    def __init__(self, transfers: Transfers | None) -> None:
        """With `transfers` None, those of the device that the first input lies on."""
        self._transfers = transfers
        self._last: weakref.ref[_Kept] | None = None
        self._leaving: tuple[Tensor, HostCopy] | None = None

    def keep(self, tensor: Tensor, *, is_first: bool, is_last: bool) -> _Kept:
        """Take the input of a layer, which begins to compute; `is_first` and `is_last` of the checkpointed ones."""
        self._let_go()
        last = None if self._last is None else self._last()
        is_of_another_pass = is_first and not (last is not None and last.is_first)  # else another group of its rows
        kept = _Kept(None if is_of_another_pass else self._last, is_first=is_first)
        self._last = weakref.ref(kept)
        is_small = tensor.numel() * tensor.element_size() < MIN_OFFLOADED_BYTES
        if is_last or is_small or not tensor.is_contiguous():
            kept.tensor = tensor
            return kept
        if self._transfers is None:
            self._transfers = transfers_of(tensor.device)
        kept.copy = self._transfers.send(tensor)
        self._leaving = (tensor, kept.copy)
        # Where no backward pass comes, the copy has to end with the graph, before its memory on the card is freed.
        weakref.finalize(kept, self._transfers.end, kept.copy).atexit = False
        return kept

    def hand_back(self, kept: _Kept) -> Tensor:
        """The input that `kept` stands for; the one of the layer before begins to come."""
        self._let_go()
        self._begin_to_fetch(kept)
        if kept.copy is not None and self._transfers is not None:
            self._transfers.end(kept.copy)
        before = None if kept.before is None else kept.before()
        if before is not None:
            self._begin_to_fetch(before)
        tensor, kept.tensor = kept.tensor, None  # so that it goes when the layer has no more use for it
        if tensor is None:
            raise RuntimeError("the backward pass of layers whose inputs are on the host goes through its graph once")
        return tensor

    def _begin_to_fetch(self, kept: _Kept) -> None:
        if kept.tensor is None and kept.copy is not None and not kept.copy.is_ended and self._transfers:
            kept.tensor = self._transfers.fetch(kept.copy)

    def _let_go(self) -> None:
        """Free the tensor that was leaving last: by now it had a whole layer's time to go."""
        if self._leaving is not None and self._transfers is not None:
            self._transfers.wait_until_sent(self._leaving[1])
            self._leaving = None


def offload_layer_inputs(layers: Sequence[nn.Module], transfers: Transfers | None = None) -> None:
    """Have the inputs of `layers`, which are checkpointed, wait on the host; wraps the forward of each instance.

    An input is a layer's first positional argument. It stays on the device where it is small (MIN_OFFLOADED_BYTES) or
    not contiguous, and where it is that of the last layer, which is needed at once.

    Args:
        layers: the checkpointed layers, first to last.
        transfers: how to copy; None: as the device of the first input needs it.
    """
    inputs = LayerInputs(transfers)
    for index, layer in enumerate(layers):
        is_first, is_last = index == 0, index == len(layers) - 1
        keep = functools.partial(inputs.keep, is_first=is_first, is_last=is_last)
        layer.forward = _offloaded(layer, layer.forward, keep, inputs.hand_back)


def _offloaded(
    layer: nn.Module,
    forward: Callable[..., Any],
    keep: Callable[[Tensor], _Kept],
    hand_back: Callable[[_Kept], Tensor],
) -> Callable[..., Any]:
    def unpack(packed: _Kept | Tensor) -> Tensor:
        return hand_back(packed) if isinstance(packed, _Kept) else packed

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not (args and layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        # Of what checkpointing keeps, other arguments belong to all layers. Its own hooks are on top of these inside
        # of the layer, so that these see arguments alone.
        address, shape = args[0].untyped_storage()._cdata, args[0].shape

        def pack(tensor: Tensor) -> _Kept | Tensor:
            is_input = tensor.untyped_storage()._cdata == address and tensor.shape == shape
            return keep(tensor) if is_input else tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return wrapped
