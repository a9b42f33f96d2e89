"""Bytes by category against bytes counted by hand, and peaks by phase."""

from __future__ import annotations

import mmap
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import psutil
import pytest
import torch
from torch import nn

from eightgig.memory.device_use import DeviceUse
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.receipt import Receipt, ReceiptRow
from eightgig.train.memory_meter import MemoryMeter

CPU = torch.device("cpu")


def _row(group: str, bytes_now: int, *, is_4bit: bool = False) -> ReceiptRow:
    return ReceiptRow(group, "Linear", "float32", 1, 1, 0, 2, bytes_now, is_4bit)


RECEIPT = Receipt(
    "m",
    "nf4",
    (
        _row("language linears", 1000, is_4bit=True),
        _row("embeddings", 300),
        _row("vision tower", 40),
        _row("adapters", 7),
    ),
    (),
)


def _trained(dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    weights = {
        "a": nn.Parameter(torch.ones(10, 3, dtype=dtype)),
        "b": nn.Parameter(torch.ones(5, dtype=dtype)),
    }
    optimizer = torch.optim.AdamW(weights.values())
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return weights, optimizer


def test_categories_on_a_cpu() -> None:
    record = MemoryMeter(CPU).record(RECEIPT, *_trained())
    assert record["device"] == "cpu"
    assert record["categories"] == {
        "4-bit weights": 1000,
        "16-bit weights": 340,
        "adapters": 7,
        "gradients": 35 * 4,
        "optimizer": 2 * 35 * 4 + 2 * 4,  # two moments of every weight, and a step counter of each tensor
    }
    assert "peak_reserved_bytes" not in record


def test_a_table_that_several_states_share_counts_once() -> None:
    weights, optimizer = _trained()
    table = torch.zeros(256)
    for state in optimizer.state.values():
        state["qmap"] = table
    categories = MemoryMeter(CPU).record(RECEIPT, weights, optimizer)["categories"]
    assert categories["optimizer"] == 2 * 35 * 4 + 2 * 4 + 256 * 4


def test_without_a_gpu_it_is_the_resident_memory() -> None:
    meter = MemoryMeter(CPU)
    before = meter.now_bytes()
    assert before == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    num_bytes = 64 * 2**20
    # Pages straight from the system: a tensor may be given memory that an earlier test freed, which adds nothing.
    with mmap.mmap(-1, num_bytes) as block:
        block.write(b"x" * num_bytes)
        during = meter.now_bytes()
    assert during - meter.now_bytes() == pytest.approx(num_bytes, rel=0.2)
    assert meter.record(RECEIPT, *_trained())["host_peak_rss_bytes"] >= during * 0.95


def test_each_phase_keeps_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter(CPU)
    readings = iter([5, 5, 9, 9, 3, 3, 4, 4])  # allocated and reserved after each block
    monkeypatch.setattr(MemoryMeter, "now_bytes", lambda self: next(readings))
    for name in ("train", "train", "train"):
        with meter.phase(name):
            pass
    with pytest.raises(RuntimeError), meter.phase("save"):
        raise RuntimeError
    assert meter.peaks == {
        "train": {"allocated_bytes": 9, "reserved_bytes": 9},
        "save": {"allocated_bytes": 4, "reserved_bytes": 4},
    }
    assert meter.peak_bytes("allocated_bytes") == 9


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A stand-in for a card, its readings in bytes."""
    readings = {"allocated": 2000, "max_allocated": 5000, "reserved": 5500, "max_reserved": 6000}
    answers: dict[str, Any] = {
        "reset_peak_memory_stats": lambda device: readings.update(max_allocated=readings["allocated"]),
        "memory_allocated": lambda device: readings["allocated"],
        "max_memory_allocated": lambda device: readings["max_allocated"],
        "memory_reserved": lambda device: readings["reserved"],
        "max_memory_reserved": lambda device: readings["max_reserved"],
        "get_device_name": lambda device: "a card",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    use = DeviceUse(used_bytes=6500, total_bytes=8000, counts_other_programs=False)
    monkeypatch.setattr("eightgig.train.memory_meter.device_use", lambda device: use)
    return readings


def test_categories_on_a_gpu_add_up_to_the_peak(card: dict[str, int]) -> None:
    meter = MemoryMeter(torch.device("cuda"))
    with meter.phase("train"):
        card["max_allocated"] = 5000
    record = meter.record(RECEIPT, *_trained())
    categories = record["categories"]
    assert record["device"] == "a card"
    assert (record["peak_allocated_bytes"], record["peak_reserved_bytes"]) == (5000, 6000)
    assert categories["allocator overhead"] == 1000
    assert categories["CUDA context"] == 6500 - 5500
    assert (record["device_used_bytes"], record["device_total_bytes"]) == (6000 + 1000, 8000)
    assert record["counts_other_programs"] is False
    below_peak = [name for name in categories if name not in ("allocator overhead", "CUDA context")]
    assert sum(categories[name] for name in below_peak) == 5000


def test_weights_in_ram_are_not_among_the_gpus(card: dict[str, int]) -> None:
    torch.manual_seed(0)
    linears = [nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False)).to(CPU) for _ in range(3)]
    streamed = StreamedWeights(linears, CPU)
    for linear in linears:
        linear.eval()(torch.ones(1, 64))
    rows = (*RECEIPT.rows[:1], replace(RECEIPT.rows[0], on_host=True), replace(RECEIPT.rows[1], on_host=True))
    receipt = replace(RECEIPT, rows=(*rows, *RECEIPT.rows[2:]))
    record = MemoryMeter(torch.device("cuda")).record(receipt, *_trained(), streamed)
    block_bytes = 64 * 64 // 2 + 512  # the 64 scales begin with a multiple of 512
    assert record["categories"]["4-bit weights"] == 1000 + 2 * block_bytes
    assert record["categories"]["16-bit weights"] == 40
    assert record["host_weights_bytes"] == 300 + 3 * block_bytes
    assert record["streamed_bytes"] == 3 * block_bytes


def test_a_step_sees_the_highest_of_all_phases(card: dict[str, int]) -> None:
    meter = MemoryMeter(torch.device("cuda"))
    with meter.phase("validate"):
        card["max_allocated"] = 5900
    card["max_allocated"] = 4000
    assert meter.step_fields() == {
        "memory_now_bytes": 2000,
        "memory_peak_bytes": 5900,
        "memory_reserved_peak_bytes": 6000,
    }


@pytest.mark.parametrize(("reserved", "expected"), [(7999, 0), (8000, 0), (8700, 700)])
def test_what_is_more_than_the_card_has_was_moved_off_it(
    card: dict[str, int], monkeypatch: pytest.MonkeyPatch, reserved: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8000))
    card["reserved"] = reserved
    assert MemoryMeter(torch.device("cuda")).spilled_bytes() == expected
    assert MemoryMeter(CPU).spilled_bytes() == 0
