"""Frozen 4-bit weights of some decoder layers in pinned host memory, brought to the GPU when they are due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from eightgig.memory.packed_layers import PackedLayer
from eightgig.memory.weight_ring import NUM_SLOTS, WeightRing, follow


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

    def __init__(
        self,
        layers: Sequence[nn.Module],
        device: torch.device,
        packed: Mapping[nn.Module, PackedLayer] = MappingProxyType({}),
    ) -> None:
        """Have the 4-bit weights of `layers` streamed to `device` from host memory.

        Args:
            layers: in the order of their forward pass; other parameters of them must be on `device` already.
            device: on the CPU plain copies stand in for those of a GPU's side stream.
            packed: those of `layers` whose weights are packed already; the others are packed here.
        """
        self.moved_bytes = 0
        self._device = device
        is_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._packed = [packed[layer] if layer in packed else PackedLayer(layer, device) for layer in layers]
        sizes = [each.block.numel() for each in self._packed]
        self.host_bytes = sum(sizes)
        self._slots = [
            torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(NUM_SLOTS, len(layers)))
        ]
        self.ring_bytes = sum(slot.numel() for slot in self._slots)
        self._arrived = [torch.cuda.Event() for _ in self._slots] if is_cuda else []  # type: ignore[no-untyped-call]
        for slot in self._slots:
            if self._side is not None:
                slot.record_stream(self._side)
        for index, each in enumerate(self._packed):
            each.show(self._slots[index % len(self._slots)])
        follow(layers, WeightRing(len(layers), self))

    def start(self, layer: int, slot: int) -> None:
        """See `Carrier`."""
        host = self._packed[layer].block
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
