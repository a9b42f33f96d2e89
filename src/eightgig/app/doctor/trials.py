"""What can't be asked but must be tried: a product with a 4-bit weight, pinned memory, the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from eightgig.app.doctor.facts import DiskFacts, ProductTrial
from eightgig.core.units import MIB
from eightgig.models.precision import has_native_bf16

SIDE = 512  # of the trial's weight: 4,096 blocks of 64 values, which double quantisation takes as 16 of 256
SEED = 0
DISK_TRIAL_BYTES = 64 * MIB
PINNED_TRIAL_BYTES = 256 * MIB
# Rounding of inputs and output by half a unit each, and of partial sums on the way.
ROUNDINGS = 4
# A library that is not found or has no kernels for the card, or versions that don't go together.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, AssertionError, TypeError, ValueError)


def try_product(device: torch.device) -> ProductTrial:
    """Multiply by a weight in NF4 with double quantisation on `device`, as training does."""
    on_card = torch.bfloat16 if has_native_bf16(device) else torch.float16
    dtype = torch.float32 if device.type == "cpu" else on_card
    bound = ROUNDINGS * torch.finfo(dtype).eps
    name = str(dtype).removeprefix("torch.")
    try:
        error = _relative_error(device, dtype)
    except BROKEN as failure:
        return ProductTrial(str(device), name, None, bound, f"{type(failure).__name__}: {failure}".split("\n")[0])
    return ProductTrial(str(device), name, error, bound)


def _relative_error(device: torch.device, dtype: torch.dtype) -> float:
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator().manual_seed(SEED)
    weight, inputs = (torch.randn(SIDE, SIDE, generator=generator).to(device, dtype) for _ in range(2))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    product = bnb.matmul_4bit(inputs, packed.t(), quant_state=state)
    expected = inputs.float() @ _read_out(packed, state).t()
    return float((product.float() - expected).norm() / expected.norm())


def _read_out(packed: Tensor, state: object) -> Tensor:
    """The weight, fp32 [out, in], by the definition of NF4, without bitsandbytes' kernels.

    Each byte holds two indices into the table of 16 levels, the first in its upper half; each block of values has a
    scale, and these are themselves levels of a table of 256, with scales of their own and a mean (QLoRA, section 3).
    """
    scales = state.state2.code[state.absmax.long()]  # type: ignore[attr-defined]
    scales = scales.view(-1, min(state.state2.blocksize, scales.numel())) * state.state2.absmax.unsqueeze(1)  # type: ignore[attr-defined]
    scales = scales.flatten() + state.offset  # type: ignore[attr-defined]
    indices = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
    levels = state.code[indices].view(-1, state.blocksize)  # type: ignore[attr-defined]
    weight: Tensor = (levels * scales.unsqueeze(1)).view(state.shape)  # type: ignore[attr-defined]
    return weight


def try_pinned(device: torch.device) -> float | None:
    """Bytes a second of pinned memory to `device`; None where memory can't be pinned, or on a CPU."""
    if device.type == "cpu":
        return None
    try:
        pinned = torch.empty(PINNED_TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(pinned, device=device)
    except RuntimeError:
        return None
    target.copy_(pinned, non_blocking=True)  # the first one also starts what copies
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize(device)
    return PINNED_TRIAL_BYTES / (time.perf_counter() - started)


def try_disk(folder: Path) -> DiskFacts:
    """Write a file in `folder`, wait until the disk has it, and delete it."""
    block = os.urandom(MIB)  # a disk that compresses must not be the faster for it
    try:
        free_bytes = shutil.disk_usage(folder).free
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".eightgig-doctor-") as file:
            started = time.perf_counter()
            for _ in range(DISK_TRIAL_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_TRIAL_BYTES / (time.perf_counter() - started)
    except OSError as error:
        return DiskFacts(folder, 0, None, error.strerror or str(error))
    return DiskFacts(folder, free_bytes, speed)
