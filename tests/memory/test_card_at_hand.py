"""Which card is at hand, with stand-ins for the driver and for CUDA."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from eightgig.core.units import GIB, MIB
from eightgig.memory.card_at_hand import card_at_hand
from eightgig.registry.gpus import get_gpu


def show_driver(monkeypatch: pytest.MonkeyPatch, *names: str, total_bytes: int = 8188 * MIB) -> None:
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.95.05")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(names))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda index: names[index])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index: SimpleNamespace(total=total_bytes))


def show_torch(monkeypatch: pytest.MonkeyPatch, properties: Any | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: properties is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_without_a_driver_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert card_at_hand() is None


def test_a_driver_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    show_driver(monkeypatch)
    assert card_at_hand() is None


def test_the_driver_alone_tells_a_single_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    show_driver(monkeypatch, "NVIDIA GeForce RTX 4060 Ti", total_bytes=16380 * MIB)
    monkeypatch.delattr(torch.cuda, "is_available")  # asking PyTorch would fail
    found = card_at_hand()
    assert found is not None
    assert (found.gpu, found.driver) == (get_gpu("RTX 4060 Ti 16GB"), "580.95.05")


@pytest.mark.parametrize("visible", ["", "-1", "1", "GPU-1d2c0b5e"])
def test_where_cards_may_be_hidden_pytorch_is_asked(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show_driver(monkeypatch, "NVIDIA GeForce RTX 4060")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show_torch(monkeypatch, None)
    assert card_at_hand() is None


def test_of_several_cards_pytorch_names_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    show_driver(monkeypatch, "NVIDIA GeForce RTX 4060", "NVIDIA GeForce RTX 3090")
    show_torch(monkeypatch, SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=24 * GIB, major=8, minor=6))
    found = card_at_hand()
    assert found is not None
    assert found.gpu == replace(get_gpu("RTX 3090"), vram_bytes=24 * GIB, vram_basis="as CUDA reports it")


def test_a_card_outside_the_table_is_taken_as_pytorch_describes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    show_driver(monkeypatch, "NVIDIA Nothing 9")
    show_torch(monkeypatch, SimpleNamespace(name="NVIDIA Nothing 9", total_memory=5 * GIB, major=7, minor=5))
    found = card_at_hand()
    assert found is not None
    assert (found.gpu.name, found.gpu.vram_bytes) == ("NVIDIA Nothing 9", 5 * GIB)
    assert (found.gpu.compute_capability, found.gpu.has_bf16) == ((7, 5), False)
    assert found.gpu.matrix_flop_per_s is None
