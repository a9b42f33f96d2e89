"""What CUDA kernels take beside their outputs: the one place where a GPU's behaviour is told apart from the CPU's.

Sizes and their order were read off allocator traces of full-size runs on an H100 (torch 2.11, bitsandbytes 0.50.2;
`benchmarks/traced.py`); the cuBLAS workspace of other cards is that of torch's `CUDABlas` defaults.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import bitsandbytes  # noqa: F401 - it makes its operators known to torch
import torch
from torch import Tensor

from eightgig.core.units import MIB
from eightgig.plan.categories import DEQUANTISED, LAYER_AT_WORK

if TYPE_CHECKING:
    from eightgig.plan.recorder import Ledger

aten = torch.ops.aten
_GEMM_4BIT = torch.ops.bitsandbytes.gemm_4bit.default
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm_.default}
_PRODUCTS_WITH_BIAS = {aten.addmm.default}
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_CONCERNED = frozenset({_GEMM_4BIT, _ATTENTION_BACKWARD, *_PRODUCTS, *_PRODUCTS_WITH_BIAS})

# torch's default CUBLAS_WORKSPACE_CONFIG, `:4096:2:16:8` (KiB and how many), and 32 MiB from Hopper on.
WORKSPACE_BYTES = 2 * 4096 * 1024 + 8 * 16 * 1024
WORKSPACE_BYTES_HOPPER = 32 * MIB
HOPPER = (9, 0)
LT_WORKSPACE_BYTES = 1 * MIB
FUSED_GEMM_MAX_ROWS = 4  # bitsandbytes' _GEMM_4BIT_CUSTOM_FLOOR_M: below, no 16-bit copy of the weight is made
SCALE_BYTES = 4
_BIAS, _NESTED_SCALES = (6, "bias"), (7, "absmax_8bit")  # arguments of gemm_4bit: their places and names


class CudaRules:
    """What a card of `compute_capability` takes on top of an operation's outputs."""

    def __init__(self, compute_capability: tuple[int, int]) -> None:
        is_large = compute_capability >= HOPPER
        self._workspace_bytes = WORKSPACE_BYTES_HOPPER if is_large else WORKSPACE_BYTES

    def concern(self, func: Any) -> bool:
        """Whether `func` takes anything that its outputs don't show."""
        return func in _CONCERNED

    @contextlib.contextmanager
    def around(self, func: Any, args: tuple[Any, ...], keywords: Mapping[str, Any], ledger: Ledger) -> Iterator[None]:
        """Around the operation `func` and its outputs: what its kernel takes while it runs."""
        taken = []
        if func is _GEMM_4BIT and math.prod(args[0].shape[:-1]) > FUSED_GEMM_MAX_ROWS:
            taken = self._dequantised(args, keywords, ledger)
        yield
        self._take_workspaces(func, args, keywords, ledger)  # cuBLAS is called when the output is there
        if func is _ATTENTION_BACKWARD:
            taken.append(ledger.alloc(_attention_workspace_bytes(args), LAYER_AT_WORK))
        for block in reversed(taken):
            ledger.free(block)

    def _take_workspaces(self, func: Any, args: tuple[Any, ...], keywords: Mapping[str, Any], ledger: Ledger) -> None:
        """CuBLAS keeps a workspace for each thread that multiplies; the backward pass has a thread of its own."""
        has_bias = func in _PRODUCTS_WITH_BIAS or (func is _GEMM_4BIT and _given(args, keywords, _BIAS))
        if not (has_bias or func in _PRODUCTS or func is _GEMM_4BIT):
            return
        is_backward = torch._C._current_graph_task_id() != -1
        wanted = [("cublas", self._workspace_bytes)] + ([("cublasLt", LT_WORKSPACE_BYTES)] if has_bias else [])
        for name, size_bytes in wanted:
            ledger.alloc_once(f"{name} {'backward' if is_backward else 'forward'}", size_bytes)

    def _dequantised(self, args: tuple[Any, ...], keywords: Mapping[str, Any], ledger: Ledger) -> list[int]:
        """Bitsandbytes' fallback: the scales in fp32 (before and after their offset), then the weight in 16 bits."""
        inputs, _, (num_rows, num_columns), _, blocksize = args[:5]
        num_parameters = num_rows * num_columns
        taken = []
        if _given(args, keywords, _NESTED_SCALES):
            taken += [ledger.alloc(num_parameters // blocksize * SCALE_BYTES, DEQUANTISED) for _ in range(2)]
        return [*taken, ledger.alloc(num_parameters * inputs.element_size(), DEQUANTISED)]


def _given(args: tuple[Any, ...], keywords: Mapping[str, Any], argument: tuple[int, str]) -> bool:
    """Whether an optional argument has a value; the dispatcher hands over by place what was given by name."""
    place, name = argument
    return (args[place] if place < len(args) else keywords.get(name)) is not None


def _attention_workspace_bytes(args: tuple[Any, ...]) -> int:
    """An fp32 copy of the query's gradient, and one number for each row of the attention matrix."""
    query: Tensor = args[1]
    num_rows = query.numel() // query.shape[-1]
    return (query.numel() + num_rows) * torch.float32.itemsize
