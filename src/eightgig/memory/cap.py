"""A limit on what PyTorch may reserve on the GPU, to test on a large card what a small one would do."""

from __future__ import annotations

import torch

from eightgig.core.errors import ConfigError, Problem
from eightgig.core.units import GIB


def limit_allocator(device: torch.device, cap_gib: float | None) -> None:
    """Make PyTorch's allocator on `device` refuse to go beyond `cap_gib`; None sets no limit.

    The CUDA context and libraries (some hundred MiB) lie outside of it.

    Raises:
        ConfigError: the device is no GPU, or has less memory than the cap.
    """
    if cap_gib is None:
        return
    if device.type != "cuda":
        raise ConfigError(
            [
                Problem(
                    "hardware.cap_gib",
                    f"{cap_gib:g}",
                    f"only a GPU's memory can be capped, and this run is on the {device}",
                )
            ],
            source="memory",
            next_step="leave hardware.cap_gib (--cap-gib) out, or run on a GPU",
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    total_bytes = torch.cuda.get_device_properties(index).total_memory
    if cap_gib * GIB > total_bytes:
        raise ConfigError(
            [Problem("hardware.cap_gib", f"{cap_gib:g}", f"at most the card's {total_bytes / GIB:.2f} GiB")],
            source="memory",
            next_step="lower hardware.cap_gib (--cap-gib), or leave it out",
        )
    torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total_bytes, index)
