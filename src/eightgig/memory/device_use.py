"""How much of a card's memory this process has taken, as the driver counts it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pynvml
import torch


@dataclass(frozen=True)
class DeviceUse:
    """What the driver shows.

    Attributes:
        used_bytes: taken by this process, CUDA context and libraries included; where the driver does not tell processes
            apart (Windows, containers with process numbers of their own), by all programs on the card.
        total_bytes: of the card.
        counts_other_programs: whether `used_bytes` is the whole card's.
    """

    used_bytes: int
    total_bytes: int
    counts_other_programs: bool


def device_use(device: torch.device) -> DeviceUse:
    """What the driver shows for the CUDA device `device` now."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = _own_bytes(torch.cuda.get_device_properties(device).uuid)
    if own_bytes is None:
        return DeviceUse(total_bytes - free_bytes, total_bytes, counts_other_programs=True)
    return DeviceUse(own_bytes, total_bytes, counts_other_programs=False)


def used_by_others(device: torch.device, context_bytes: int) -> int:
    """Bytes of the CUDA device `device` that other programs have now; 0 where it is none.

    Args:
        device: of this process, which has allocated nothing there yet.
        context_bytes: what this process is taken to have, where the driver does not tell processes apart.
    """
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = _own_bytes(torch.cuda.get_device_properties(device).uuid)
    return max(total_bytes - free_bytes - (context_bytes if own_bytes is None else own_bytes), 0)


def _own_bytes(uuid: object) -> int | None:
    """Bytes that the driver counts for this process on the card `uuid`; None where it does not say."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
