"""Frozen 4-bit weights of some decoder layers in pinned host memory, brought to the GPU when they are due."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from eightgig.core.logging import get_logger
from eightgig.memory.weight_ring import NUM_SLOTS, WeightRing, follow

ALIGNMENT_BYTES = 512  # of each tensor in a buffer: that of PyTorch's own allocator, on which kernels rely

logger = get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where one tensor of a layer lies in the layer's block of bytes.

    Attributes:
        owner: what holds it: a 4-bit weight, or the quantisation state of one.
        name: the attribute of `owner`.
    """

    owner: Any
    name: str
    offset_bytes: int

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor

    def view(self, block: Tensor) -> Tensor:
        """The bytes of `block`, uint8 [bytes], that are this tensor's, in its dtype and shape."""
        tensor = self.tensor
        flat = block[self.offset_bytes : self.offset_bytes + tensor.numel() * tensor.element_size()]
        return flat.view(tensor.dtype).view(tensor.shape)


class StreamedWeights:
    """Carries the weights of some layers from pinned host memory into a ring of GPU buffers.

    The packed weights of a layer, and their scales (of doubly quantised ones the 8-bit scales: 1/64 byte a weight),
    travel in one block. What is left of the quantisation state (scales of scales: 1/4096 byte a weight; tables) stays
    on the GPU. A layer's parameters are views of its buffer, so outside of its passes they show another layer's bytes:
    nothing but the layer itself may read them.

    Attributes:
        moved_bytes: brought to the GPU so far.
        host_bytes: in host memory.
        ring_bytes: of the buffers.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Move the 4-bit weights of `layers` to the host, wherever they are now, and have them streamed to `device`.

        Args:
            layers: in the order of their forward pass; other parameters of them must be on `device` already.
            device: on the CPU plain copies stand in for those of a GPU's side stream.
        """
        self.moved_bytes = 0
        self._device = device
        is_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        places = [layer_places(layer) for layer in layers]
        sizes = [block_bytes(each) for each in places]
        self.host_bytes = sum(sizes)
        self._slots = [
            torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(NUM_SLOTS, len(layers)))
        ]
        self.ring_bytes = sum(slot.numel() for slot in self._slots)
        self._arrived = [torch.cuda.Event() for _ in self._slots] if is_cuda else []  # type: ignore[no-untyped-call]
        for slot in self._slots:
            if self._side is not None:
                slot.record_stream(self._side)
        self._hosts = [self._packed(each, index) for index, each in enumerate(places)]
        follow(layers, WeightRing(len(layers), self))

    def start(self, layer: int, slot: int) -> None:
        """See `Carrier`."""
        host = self._hosts[layer]
        target = self._slots[slot][: host.numel()]
        self.moved_bytes += host.numel()
        if self._side is None:
            target.copy_(host)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(host, non_blocking=True)
            self._arrived[slot].record(self._side)

    def finish(self, slot: int) -> None:
        """See `Carrier`."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])

    def _packed(self, places: Sequence[Place], index: int) -> Tensor:
        """The block of a layer on the host; its parameters become views of its buffer, and give back what they held."""
        host = self._pinned(block_bytes(places))
        slot = self._slots[index % len(self._slots)]
        for place in places:
            place.view(host).copy_(place.tensor)
            view = place.view(slot)
            if isinstance(place.owner, nn.Parameter):
                place.owner.on_host = True  # type: ignore[attr-defined]
            setattr(place.owner, place.name, view)
        return host

    def _pinned(self, num_bytes: int) -> Tensor:
        """Host memory that a GPU copies from by itself, uint8 [num_bytes]; pageable where it can't be had.

        Registered with CUDA rather than taken from PyTorch's allocator, which rounds up to a power of two. It begins
        and ends with a page, as what is registered twice is refused. `Tensor.is_pinned` is False even so: it asks for
        the storage's first byte, which lies ahead of that page.
        """
        if self._side is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
        begin = -whole.data_ptr() % mmap.PAGESIZE
        pages = whole[begin : begin + size]
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(pages.data_ptr(), size, 0)
        if int(error) != 0:
            logger.warning("%d bytes of streamed weights can't be pinned (%s): their copies are slow", num_bytes, error)
            # CUDA keeps the error for whoever asks next: the launch of a kernel, which would seem to have failed.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device)
        else:
            # Holds the memory until it is unregistered; at the end of the process the system does both.
            weakref.finalize(self, _unregister, runtime, pages).atexit = False
        return pages[:num_bytes]


def quantised_linears(layer: nn.Module) -> list[nn.Module]:
    """The 4-bit linear layers in `layer`."""
    return [module for module in layer.modules() if isinstance(module, bnb.nn.Linear4bit)]


def layer_places(layer: nn.Module) -> list[Place]:
    """The tensors of `layer` that are streamed, one behind the other."""
    places = []
    offset_bytes = 0
    for module in quantised_linears(layer):
        weight: Any = module.weight
        for owner, name in ((weight, "data"), (weight.quant_state, "absmax")):
            places.append(Place(owner, name, offset_bytes))
            offset_bytes += _aligned(places[-1].tensor)
    return places


def block_bytes(places: Sequence[Place]) -> int:
    """What the tensors at `places` take together."""
    return sum(_aligned(place.tensor) for place in places)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _unregister(runtime: Any, pages: Tensor) -> None:
    runtime.cudaHostUnregister(pages.data_ptr())
