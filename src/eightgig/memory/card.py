"""The graphics card of this machine, as the table of cards describes cards."""

from __future__ import annotations

from dataclasses import replace

import torch

from eightgig.core.errors import ConfigError
from eightgig.core.units import GIB
from eightgig.registry.gpus import GpuFacts, get_gpu, gpu_of_vram

BF16_FROM = (8, 0)  # the first compute capability that computes in bf16 itself


def card_of(device: torch.device) -> GpuFacts | None:
    """The card behind `device`, with its memory as CUDA reports it; None where `device` is no GPU.

    Of a card that the table does not have, or has several of, there is only what CUDA tells: no rates.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    total_bytes = properties.total_memory
    try:
        card = get_gpu(properties.name, vram_bytes=total_bytes)
    except ConfigError:
        capability = (properties.major, properties.minor)
        card = replace(
            gpu_of_vram(total_bytes / GIB),
            name=properties.name,
            compute_capability=capability,
            has_bf16=capability >= BF16_FROM,
        )
    return replace(card, vram_bytes=total_bytes, vram_basis="as CUDA reports it")
