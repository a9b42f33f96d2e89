"""The rates of the card in this machine, measured once and kept."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from eightgig.core.user_cache import JsonCache, cache_folder

if TYPE_CHECKING:
    from eightgig.plan.card_rates import CardRates
    from eightgig.registry.gpus import GpuFacts

MAX_CARDS = 20


def rates_at_hand(gpu: GpuFacts | None, driver: str | None) -> CardRates | None:
    """The rates of `gpu` as measured here, in a few seconds at the first call; None for a card that is only named.

    Args:
        gpu: the planned card.
        driver: the version of its driver, None where the card is not in this machine.
    """
    if gpu is None or driver is None:
        return None
    import torch

    from eightgig.plan.card_rates import MEASURED, CardRates, measure_rates, rates_as_json

    if not torch.cuda.is_available():
        return None
    cache = JsonCache(cache_folder() / "rates", MAX_CARDS)
    key = {"gpu": gpu.name, "driver": driver, "torch": version("torch"), "eightgig": version("eightgig")}
    kept = cache.get(key)
    if isinstance(kept, dict):
        return CardRates(**kept, basis=MEASURED)
    rates = measure_rates(torch.device("cuda", torch.cuda.current_device()))
    cache.put(key, rates_as_json(rates))
    return rates
