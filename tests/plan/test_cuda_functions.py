"""Dropout as a GPU does it: what it takes by hand, what it computes beside its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eightgig.plan.cuda_functions import fuse_dropout
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import FREED, MemoryTrace


def fused(p: float, *, training: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Identity(), nn.Dropout(p)).train(training)
    fuse_dropout(model)
    return model


def test_a_dropout_takes_its_output_and_one_byte_an_element() -> None:
    model, inputs = fused(0.25), torch.randn(4, 6, requires_grad=True)
    trace = MemoryTrace()
    with Recorder(trace, CudaRules((8, 6))):
        output = model(inputs)
    assert [size for _, size in trace] == [4 * 6 * 4, 4 * 6]
    gradient = torch.ones(4, 6)
    with Recorder(trace, CudaRules((8, 6))):
        output.backward(gradient)
    del output
    assert [size for _, size in trace][2:] == [4 * 6 * 4, FREED, FREED]  # the input's gradient; mask and output go


def test_it_drops_and_scales_and_so_does_its_gradient() -> None:
    inputs = torch.rand(100, 100).add(1).requires_grad_()
    output = fused(0.25)(inputs)
    output.sum().backward()
    kept = output != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(output, torch.where(kept, inputs / 0.75, 0))
    torch.testing.assert_close(inputs.grad, torch.where(kept, 1 / 0.75, 0.0))


@pytest.mark.parametrize(("p", "training", "factor"), [(0.0, True, 1), (0.5, False, 1), (1.0, True, 0)])
def test_where_cuda_fuses_nothing_it_stays_as_it_is(p: float, training: bool, factor: int) -> None:
    inputs = torch.randn(3, 5)
    torch.testing.assert_close(fused(p, training=training)(inputs), factor * inputs)
