"""Which graphics card a run on this machine would get. Asks the driver where that will do, which takes no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pynvml

from eightgig.core.errors import ConfigError
from eightgig.registry.gpus import GpuFacts, get_gpu


@dataclass(frozen=True)
class CardAtHand:
    """A card of this machine, and the version of its driver, on which the CUDA context's size depends."""

    gpu: GpuFacts
    driver: str


def card_at_hand() -> CardAtHand | None:
    """The card that CUDA takes first; None without a driver, without a card, or where none may be seen."""
    try:
        pynvml.nvmlInit()
        driver, num_cards = str(pynvml.nvmlSystemGetDriverVersion()), pynvml.nvmlDeviceGetCount()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0) if num_cards else None
        name = None if handle is None else str(pynvml.nvmlDeviceGetName(handle))
        vram_bytes = None if handle is None else pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except pynvml.NVMLError:
        return None  # no NVIDIA driver, and so no CUDA
    if name is None:
        return None
    if num_cards == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "0") == "0":
        try:
            return CardAtHand(get_gpu(name, vram_bytes=vram_bytes), driver)
        except ConfigError:
            return _as_torch_sees_it(driver)  # not in the table
    return _as_torch_sees_it(driver)


def _as_torch_sees_it(driver: str) -> CardAtHand | None:
    """PyTorch's first device: it alone knows its order among several, and what one outside the table can do."""
    import torch

    if not torch.cuda.is_available():
        return None
    from eightgig.memory.card import card_of

    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    return None if card is None else CardAtHand(card, driver)
