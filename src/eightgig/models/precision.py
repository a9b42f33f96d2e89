"""Which number format to compute in, given what was asked for and what the device does natively."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eightgig.config import MixedPrecision

DTYPES = {
    MixedPrecision.BF16: torch.bfloat16,
    MixedPrecision.FP16: torch.float16,
    MixedPrecision.FP32: torch.float32,
}

# Names under which torch.cpu.get_capabilities() reports bf16 arithmetic: x86 with AVX512 or AMX, ARM.
NATIVE_BF16_ON_CPU = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Precision:
    """What a run computes in.

    Attributes:
        compute_dtype: dtype of activations and of the frozen weights that are not 4-bit.
        mixed_precision: the same, as the configuration's word.
        note: one sentence on why this is not what was asked for; None where it is.
    """

    compute_dtype: torch.dtype
    mixed_precision: MixedPrecision
    note: str | None


def choose_precision(requested: MixedPrecision, device: torch.device) -> Precision:
    """The requested precision, or the nearest that `device` computes natively, with a note that says so.

    bf16 becomes fp16 on a GPU without it (before Ampere) and fp32 on such a CPU. fp16 becomes fp32 on a CPU, where
    its backward pass through a 4-bit layer takes hundreds of times longer (measured: reference/stack.md, Q1).
    """
    chosen, reason = requested, None
    if requested is MixedPrecision.BF16 and not has_native_bf16(device):
        chosen = MixedPrecision.FP16 if device.type == "cuda" else MixedPrecision.FP32
        reason = f"{_device_name(device)} has no native bf16"
    elif requested is MixedPrecision.FP16 and device.type == "cpu":
        chosen = MixedPrecision.FP32
        reason = "fp16 arithmetic is very slow on a CPU"
    note = None if reason is None else f"{reason}: computing in {chosen.value} instead of {requested.value}"
    return Precision(DTYPES[chosen], chosen, note)


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` has bf16 arithmetic of its own; emulation does not count."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in NATIVE_BF16_ON_CPU)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "this CPU"
