"""Measured memory: peaks by phase of the run, and the bytes of each category of tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from eightgig.memory.device_use import device_use
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.receipt import Receipt


@dataclass(frozen=True)
class GpuPeaks:
    """The most that a run has held on its GPU so far.

    Attributes:
        allocated_bytes, reserved_bytes: by PyTorch.
        device_bytes: what the driver counts: reserved, and the CUDA context.
        total_bytes: of the card.
        counts_other_programs: whether the context could only be told together with the card's other programs.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    total_bytes: int
    counts_other_programs: bool


class MemoryMeter:
    """Peaks of allocated and reserved GPU memory for each phase; resident host memory where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.peaks: dict[str, dict[str, int]] = {}
        self._process = psutil.Process()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count peaks inside the block towards phase `name` (train, validate, save)."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            self._note_peaks(name)

    def _note_peaks(self, name: str) -> None:
        peak = self.peaks.setdefault(name, {"allocated_bytes": 0, "reserved_bytes": 0})
        peak["allocated_bytes"] = max(peak["allocated_bytes"], self._live_peak_bytes())
        peak["reserved_bytes"] = max(peak["reserved_bytes"], self._live_reserved_bytes())

    def now_bytes(self) -> int:
        """Bytes allocated on the GPU now; without one, the resident memory of this process."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.device)
        return int(self._process.memory_info().rss)

    def step_fields(self) -> dict[str, int]:
        """Memory now and at its highest so far, as a step's record holds it."""
        return {
            "memory_now_bytes": self.now_bytes(),
            "memory_peak_bytes": max(self.peak_bytes("allocated_bytes"), self._live_peak_bytes()),
            "memory_reserved_peak_bytes": max(self.peak_bytes("reserved_bytes"), self._live_reserved_bytes()),
        }

    def _live_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else self.now_bytes()

    def _live_reserved_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) if self.is_cuda else self.now_bytes()

    def peak_bytes(self, kind: str) -> int:
        """The highest `allocated_bytes` or `reserved_bytes` of any phase so far."""
        return max((peak[kind] for peak in self.peaks.values()), default=0)

    def spilled_bytes(self) -> int:
        """Bytes by which what PyTorch holds now is more than the card has: they can only lie elsewhere."""
        if not self.is_cuda:
            return 0
        total_bytes = torch.cuda.get_device_properties(self.device).total_memory
        return max(0, torch.cuda.memory_reserved(self.device) - total_bytes)

    def gpu_peaks(self) -> GpuPeaks | None:
        """The highest of any phase so far; None without a GPU."""
        if not self.is_cuda:
            return None
        use = device_use(self.device)
        reserved_bytes = self.peak_bytes("reserved_bytes")
        return GpuPeaks(
            allocated_bytes=self.peak_bytes("allocated_bytes"),
            reserved_bytes=reserved_bytes,
            device_bytes=reserved_bytes + use.used_bytes - torch.cuda.memory_reserved(self.device),
            total_bytes=use.total_bytes,
            counts_other_programs=use.counts_other_programs,
        )

    def record(
        self,
        receipt: Receipt,
        trainable: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        streamed: StreamedWeights | None = None,
        *,
        is_tower_off: bool = False,
    ) -> dict[str, Any]:
        """The content of memory.json.

        Weights that are kept in RAM stand in `host_weights_bytes` and not among the categories; the buffers of streamed
        ones are 4-bit weights.

        Categories other than the first five are differences: activations are what the peak of training holds beyond
        weights, gradients and optimizer; the allocator's overhead is what it reserves beyond that; the CUDA context is
        what the driver counts for this process beyond what PyTorch reserves (`counts_other_programs` says where it
        could only tell what the whole card has in use). `device_used_bytes` is that context and the peak reserved.
        The vision tower's weights are left out where it is off the card in training.
        """
        elsewhere = {"adapters", "vision tower"} if is_tower_off else {"adapters"}
        frozen = [row for row in receipt.rows if row.group not in elsewhere and not row.on_host]
        tables_bytes = sum(row.bytes_now for row in receipt.rows if row.on_host and not row.is_4bit)
        ring_bytes = 0 if streamed is None else streamed.ring_bytes
        categories = {
            "4-bit weights": sum(row.bytes_now for row in frozen if row.is_4bit) + ring_bytes,
            "16-bit weights": sum(row.bytes_now for row in frozen if not row.is_4bit),
            "adapters": sum(row.bytes_now for row in receipt.rows if row.group == "adapters"),
            "gradients": sum(p.numel() * p.element_size() for p in trainable.values()),
            "optimizer": _state_bytes(optimizer),
        }
        record: dict[str, Any] = {
            "device": torch.cuda.get_device_name(self.device) if self.is_cuda else "cpu",
            "phases": self.peaks,
            "host_peak_rss_bytes": _peak_rss_bytes(self._process),
            "host_weights_bytes": tables_bytes + (0 if streamed is None else streamed.host_bytes),
            "streamed_bytes": 0 if streamed is None else streamed.moved_bytes,
        }
        peaks = self.gpu_peaks()
        if peaks is not None:
            categories["activations and temporary"] = peaks.allocated_bytes - sum(categories.values())
            categories["allocator overhead"] = peaks.reserved_bytes - peaks.allocated_bytes
            categories["CUDA context"] = peaks.device_bytes - peaks.reserved_bytes
            record |= {
                "peak_allocated_bytes": peaks.allocated_bytes,
                "peak_reserved_bytes": peaks.reserved_bytes,
                "device_used_bytes": peaks.device_bytes,
                "device_total_bytes": peaks.total_bytes,
                "counts_other_programs": peaks.counts_other_programs,
            }
        return record | {"categories": categories}


def _peak_rss_bytes(process: psutil.Process) -> int:
    """Highest resident memory of `process` since its start: what the system counted where it does, else the present."""
    memory = process.memory_info()
    if find_spec("resource") is None:  # Windows, where psutil has the peak itself
        return int(getattr(memory, "peak_wset", memory.rss))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; a table shared by several parameters counts once."""
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
