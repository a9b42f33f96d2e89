"""Which precision a run gets on which device."""

from __future__ import annotations

import pytest
import torch

from eightgig.config import MixedPrecision
from eightgig.models import precision
from eightgig.models.precision import choose_precision
from eightgig.models.quantization import compute_dtype_4bit

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def native_bf16(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return request.param


@pytest.mark.parametrize(
    ("native_bf16", "device", "requested", "chosen", "note"),
    [
        (True, CUDA, "bf16", "bf16", None),
        (False, CUDA, "bf16", "fp16", "Tesla T4 has no native bf16: computing in fp16 instead of bf16"),
        (False, CUDA, "fp16", "fp16", None),
        (True, CUDA, "fp32", "fp32", None),
        (True, CPU, "bf16", "bf16", None),
        (False, CPU, "bf16", "fp32", "this CPU has no native bf16: computing in fp32 instead of bf16"),
        (True, CPU, "fp16", "fp32", "fp16 arithmetic is very slow on a CPU: computing in fp32 instead of fp16"),
        (False, CPU, "fp32", "fp32", None),
    ],
    indirect=["native_bf16"],
)
def test_precision_is_what_was_asked_or_says_why_not(
    native_bf16: bool, device: torch.device, requested: str, chosen: str, note: str | None
) -> None:
    result = choose_precision(MixedPrecision(requested), device)
    assert (result.mixed_precision.value, result.note) == (chosen, note)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    assert result.compute_dtype is names[chosen]


@pytest.mark.parametrize(
    ("capabilities", "native"), [({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)]
)
def test_a_cpus_bf16_is_read_from_its_capabilities(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.has_native_bf16(CPU) is native


@pytest.mark.parametrize("native_bf16", [False], indirect=True)
def test_4bit_layers_follow_the_same_downgrades(native_bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_precision(MixedPrecision.BF16, CUDA)
    assert compute_dtype_4bit("auto", CUDA, chosen) is torch.float16
    assert not caplog.records
    assert compute_dtype_4bit("bfloat16", CUDA, chosen) is torch.float16
    assert "has no native bf16" in caplog.text
    assert compute_dtype_4bit("float32", CUDA, chosen) is torch.float32
    assert compute_dtype_4bit("float16", CPU, chosen) is torch.float32
