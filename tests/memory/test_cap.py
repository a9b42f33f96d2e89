"""The cap on PyTorch's allocator: set as a share of the card, refused where it can't act."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eightgig.core.errors import ConfigError
from eightgig.memory.cap import limit_allocator

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    calls: list[float] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 1024**3))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: calls.append(share + index))
    return calls


@pytest.mark.parametrize("device", [CUDA, torch.device("cuda")])
def test_the_cap_becomes_a_share_of_the_card(device: torch.device, fractions: list[float]) -> None:
    limit_allocator(device, 6.0)
    assert fractions == [0.25]


def test_no_cap_sets_no_limit(fractions: list[float]) -> None:
    limit_allocator(CUDA, None)
    limit_allocator(torch.device("cpu"), None)
    assert fractions == []


def test_a_cap_above_the_card_is_refused(fractions: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"hardware\.cap_gib = 25: at most the card's 24\.00 GiB"):
        limit_allocator(CUDA, 25.0)
    assert fractions == []


def test_a_cap_without_a_gpu_is_refused_since_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigError, match=r"hardware\.cap_gib = 7\.25: only a GPU's memory can be capped"):
        limit_allocator(torch.device("cpu"), 7.25)
