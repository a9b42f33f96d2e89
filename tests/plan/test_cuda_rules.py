"""What CUDA kernels take beside their outputs, by hand."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from eightgig.core.units import MIB
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import FREED, MemoryTrace


def sizes(trace: MemoryTrace) -> list[int]:
    return [size for _, size in trace]


@pytest.mark.parametrize(("capability", "workspace"), [((8, 9), 8.125 * MIB), ((9, 0), 32 * MIB), ((12, 0), 32 * MIB)])
def test_each_thread_keeps_one_workspace(capability: tuple[int, int], workspace: float) -> None:
    trace = MemoryTrace()
    weight = torch.ones(3, 3, requires_grad=True)
    with Recorder(trace, CudaRules(capability)):
        for _ in range(2):
            torch.mm(torch.ones(2, 3), weight).sum().backward()
    assert sizes(trace).count(int(workspace)) == 2  # the forward pass's, and the backward pass's


def test_a_workspace_is_taken_when_the_output_is_there() -> None:
    """So that it may lie behind a large output, which the next one then can't grow over (the logits, for instance)."""
    trace = MemoryTrace()
    with Recorder(trace, CudaRules((9, 0))):
        torch.mm(torch.ones(2, 3), torch.ones(3, 1000))
    assert [size for size in sizes(trace) if size != FREED][-2:] == [2 * 1000 * 4, 32 * MIB]


def test_a_4bit_product_takes_its_scales_and_a_16bit_copy_while_it_runs() -> None:
    rows, columns = 96, 128
    packed, state = functional.quantize_4bit(torch.randn(rows, columns), compress_statistics=True, quant_type="nf4")
    inputs = torch.randn(5, columns)
    arguments = (inputs, packed, state.shape, state.state2.absmax, state.blocksize, state.quant_type)
    nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    trace = MemoryTrace()
    rules = CudaRules((8, 6))
    with Recorder(trace, rules):
        torch.ops.bitsandbytes.gemm_4bit.default(*arguments, **nested)
    scales = rows * columns // 64 * 4
    assert sizes(trace)[:4] == [scales, scales, rows * columns * 4, 5 * rows * 4]
    assert sizes(trace)[5:].count(FREED) == 4

    trace, few_inputs = MemoryTrace(), torch.randn(4, columns)
    with Recorder(trace, rules):
        torch.ops.bitsandbytes.gemm_4bit.default(few_inputs, *arguments[1:], **nested)
    few_rows = [4 * rows * 4, int(8.125 * MIB), FREED]  # with the workspace: they are multiplied without a copy
    assert sizes(trace) == few_rows
