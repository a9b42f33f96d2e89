"""Which card a plan is for, as the user says it."""

from __future__ import annotations

from dataclasses import dataclass

from eightgig.core.units import GIB
from eightgig.memory.card_at_hand import card_at_hand
from eightgig.registry.gpus import GpuFacts, get_gpu, gpu_of_vram


@dataclass(frozen=True)
class CardWanted:
    """The card that a plan is for: `gpu` by name, one of `vram_gib`, else the one in this machine, else none.

    Attributes:
        reserve_gib: of the card's memory, kept free for its other users.
    """

    gpu: str | None = None
    vram_gib: float | None = None
    reserve_gib: float = 0.0


def facts_of_card(card: CardWanted) -> tuple[GpuFacts | None, str | None]:
    """The card that is meant, and the driver's version where it is in this machine.

    Raises:
        ConfigError: no card is called so, or several are.
    """
    if card.gpu is not None:
        vram_bytes = None if card.vram_gib is None else round(card.vram_gib * GIB)
        return get_gpu(card.gpu, vram_bytes=vram_bytes), None
    if card.vram_gib is not None:
        return gpu_of_vram(card.vram_gib), None
    found = card_at_hand()
    return (None, None) if found is None else (found.gpu, found.driver)
