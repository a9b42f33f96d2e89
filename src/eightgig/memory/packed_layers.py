"""The 4-bit weights of a decoder layer in one block of host memory, pinned where there is a GPU to copy from it."""

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


class PackedLayer:
    """The packed 4-bit weights of a layer and their scales (8-bit ones with double quantisation), one behind the other.

    Attributes:
        places: what lies where in the block.
        block: uint8 [bytes], in host memory.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        """Move the weights of `layer`, quantised and wherever they are, into a block that `device` can copy from.

        They are views of it from here on, and what they held before is given back one by one.
        """
        self.places = layer_places(layer)
        self.block = self._pinned(block_bytes(self.places), device)
        for place in self.places:
            view = place.view(self.block)
            view.copy_(place.tensor)
            setattr(place.owner, place.name, view)

    def show(self, buffer: Tensor) -> None:
        """Make the weights views of `buffer`, uint8 [at least as many bytes], into which the block will be copied."""
        for place in self.places:
            if isinstance(place.owner, nn.Parameter):
                place.owner.on_host = True  # type: ignore[attr-defined]
            setattr(place.owner, place.name, place.view(buffer))

    def _pinned(self, num_bytes: int, device: torch.device) -> Tensor:
        """Host memory that a GPU copies from by itself, uint8 [num_bytes]; pageable where it can't be had.

        Registered with CUDA rather than taken from PyTorch's allocator, which rounds up to a power of two. It begins
        and ends with a page, as what is registered twice is refused. `Tensor.is_pinned` is False even so: it asks for
        the storage's first byte, which lies ahead of that page.
        """
        if device.type != "cuda":
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
                torch.zeros(1, device=device)
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
