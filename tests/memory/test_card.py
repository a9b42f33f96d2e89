"""The card behind a device: the table's row with CUDA's own total, or what CUDA alone tells."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eightgig.core.units import MIB
from eightgig.memory.card import card_of
from eightgig.registry.gpus import get_gpu

CUDA = torch.device("cuda", 0)


def say(monkeypatch: pytest.MonkeyPatch, name: str, total_mib: int, capability: tuple[int, int]) -> None:
    """Let CUDA describe a card so."""
    properties = SimpleNamespace(name=name, total_memory=total_mib * MIB, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_cpu_is_no_card() -> None:
    assert card_of(torch.device("cpu")) is None


def test_a_card_of_the_table_has_its_rates_and_the_memory_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "NVIDIA GeForce RTX 4060 Ti", 15931, (8, 9))
    known = get_gpu("RTX 4060 Ti 16GB")
    assert known.vram_bytes != 15931 * MIB
    assert card_of(CUDA) == replace(known, vram_bytes=15931 * MIB, vram_basis="as CUDA reports it")


@pytest.mark.parametrize(("capability", "has_bf16"), [((7, 0), False), ((8, 0), True), ((10, 0), True)])
def test_an_unknown_card_is_what_cuda_tells(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_bf16: bool
) -> None:
    say(monkeypatch, "NVIDIA Titanic", 5000, capability)
    card = card_of(CUDA)
    assert card is not None
    assert (card.name, card.vram_bytes) == ("NVIDIA Titanic", 5000 * MIB)
    assert (card.compute_capability, card.has_bf16) == (capability, has_bf16)
    assert card.matrix_flop_per_s is None
