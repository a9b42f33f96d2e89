"""Linear layers with adapters as one node: the numbers of the formula, step by step, and what is kept and read when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from eightgig.kernels.lora_linears import LoraLinear, lora_linears
from lever_numerics import FP32_TOLERANCE

CPU = torch.device("cpu")
PLAIN, SINGLE, NESTED = "16-bit", "nf4", "nf4, scales quantised too"


def _base(inner: int, outer: int, bias: bool, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if kind == PLAIN:
        return nn.Linear(inner, outer, bias, dtype=dtype).requires_grad_(False)
    base = bnb.nn.Linear4bit(
        inner, outer, bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=kind == NESTED
    )
    base.support_avx512bf16_for_cpu = False
    return base.to(CPU).requires_grad_(False)


def _weight(base: Any) -> Tensor:
    is_4bit = isinstance(base, bnb.nn.Linear4bit)
    unpacked = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state) if is_4bit else base.weight
    return unpacked.detach().clone()


def _linear(inner: int, outer: int, rank: int, *, bias: bool = False, kind: str = PLAIN, alpha: int = 8) -> LoraLinear:
    down, up = (nn.Parameter(torch.randn(shape)) for shape in ((rank, inner), (outer, rank)))
    return LoraLinear(_base(inner, outer, bias, kind), down, up, alpha / rank)


def _expected(hidden: Tensor, linears: Sequence[LoraLinear], weights: Sequence[Tensor]) -> list[Tensor]:
    """The formula, by autograd, with `weights` in the place of the frozen layers' own."""
    return [
        functional.linear(hidden, weight, each.base.bias)
        + each.scaling * functional.linear(functional.linear(hidden, each.down), each.up)
        for each, weight in zip(linears, weights, strict=True)
    ]


def _gradients(outputs: Sequence[Tensor], hidden: Tensor, linears: Sequence[LoraLinear], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
    wanted = [hidden] if hidden.requires_grad else []
    wanted += [each for linear in linears for each in (linear.down, linear.up)]
    return list(torch.autograd.grad(outputs, wanted, seeds))


def _assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for found, right in zip(ours, expected, strict=True):
        assert found.shape == right.shape
        assert found.dtype == right.dtype
        assert float((found - right).abs().max()) <= FP32_TOLERANCE * float(right.abs().max())


layers = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 64), st.booleans(), st.integers(1, 40)), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    blocks=st.integers(1, 3),
    layers=layers,
    kind=st.sampled_from([PLAIN, SINGLE, NESTED]),
    learns=st.booleans(),
)
def test_random_shapes(leading: list[int], blocks: int, layers: list[Any], kind: str, learns: bool) -> None:
    torch.manual_seed(len(layers) + blocks)
    width = 64 * blocks
    linears = [_linear(width, 64 * n, rank, bias=bias, kind=kind, alpha=alpha) for n, rank, bias, alpha in layers]
    hidden = torch.randn(*leading, width, requires_grad=learns)
    ours, expected = lora_linears(hidden, linears), _expected(hidden, linears, [_weight(each.base) for each in linears])
    _assert_close([each.detach() for each in ours], [each.detach() for each in expected])
    _assert_close(_gradients(ours, hidden, linears, seed=2), _gradients(expected, hidden, linears, seed=2))


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 5), width=st.integers(1, 7), outer=st.integers(1, 7), rank=st.integers(1, 4))
def test_the_gradient_is_that_of_differences(rows: int, width: int, outer: int, rank: int) -> None:
    torch.manual_seed(rows)
    linears = [
        LoraLinear(
            _base(width, outer + n, bias, PLAIN, torch.float64),
            torch.randn(rank, width, dtype=torch.float64),
            torch.randn(outer + n, rank, dtype=torch.float64),
            0.5 + n,
        )
        for n, bias in enumerate((True, False))
    ]

    def call(hidden: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        given = [
            LoraLinear(each.base, adapters[2 * n], adapters[2 * n + 1], each.scaling) for n, each in enumerate(linears)
        ]
        return lora_linears(hidden, given)

    adapters = [each.requires_grad_() for linear in linears for each in (linear.down, linear.up)]
    assert torch.autograd.gradcheck(
        call, (torch.randn(2, rows, width, dtype=torch.float64).requires_grad_(), *adapters)
    )


def test_outputs_that_nothing_is_made_of_take_no_part() -> None:
    linears = [_linear(64, outer, 4, kind=NESTED) for outer in (64, 128, 192)]
    hidden = torch.randn(3, 5, 64, requires_grad=True)
    ours = lora_linears(hidden, linears)
    expected = _expected(hidden, linears, [_weight(each.base) for each in linears])
    found, right = (
        torch.autograd.grad(outputs[1].square().sum(), hidden, retain_graph=True)[0] for outputs in (ours, expected)
    )
    _assert_close([found], [right])
    ours[2].sum().backward()
    assert [each.down.grad is None for each in linears] == [True, True, False]


def test_frozen_adapters_and_what_lies_otherwise_in_memory() -> None:
    linears = [_linear(64, 64, 4), _linear(64, 64, 3)]
    linears[0].down.requires_grad_(False)
    hidden = torch.randn(5, 64, 3).transpose(1, 2).requires_grad_()
    ours = lora_linears(hidden, linears)
    expected = _expected(hidden, linears, [_weight(each.base) for each in linears])
    wanted = [hidden, linears[0].up, linears[1].down, linears[1].up]
    seeds = [torch.randn(5, 64, 3).transpose(1, 2) for _ in linears]
    _assert_close(torch.autograd.grad(ours, wanted, seeds), torch.autograd.grad(expected, wanted, seeds))


def test_the_weight_is_read_again_in_the_backward_pass() -> None:
    """As it lies there then: a buffer may have held another layer's weights in between."""
    linears = [_linear(64, 128, 4, kind=NESTED)]
    hidden = torch.randn(7, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(lora_linears(hidden, linears)[0].sum(), hidden)
    (output,) = lora_linears(hidden, linears)
    weight, kept = linears[0].base.weight, linears[0].base.weight.data.clone()
    weight.data.fill_(255)
    (wrong,) = torch.autograd.grad(output.sum(), hidden, retain_graph=True)
    assert not torch.allclose(wrong, expected, rtol=0.1)
    weight.data = kept
    (right,) = torch.autograd.grad(output.sum(), hidden)
    assert torch.equal(right, expected)


def test_adapters_that_changed_since_the_forward_pass_are_noticed() -> None:
    linears = [_linear(64, 64, 4)]
    (output,) = lora_linears(torch.randn(7, 64), linears)
    with torch.no_grad():
        linears[0].up.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_graph_may_be_gone_through_twice_but_not_differentiated_twice() -> None:
    linears = [_linear(64, 64, 4)]
    hidden = torch.randn(7, 64, requires_grad=True)
    (output,) = lora_linears(hidden, linears)
    output.sum().backward(retain_graph=True)
    once = linears[0].up.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(linears[0].up.grad, 2 * once)
    (gradient,) = torch.autograd.grad(lora_linears(hidden, linears)[0].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_the_input_and_what_a_makes_of_it_are_kept(dtype: torch.dtype) -> None:
    ranks, num_rows, width = (4, 7), 2 * 9, 64
    linears = [
        LoraLinear(_base(width, 128, False, NESTED, dtype), *(nn.Parameter(torch.randn(s)) for s in shapes), 1.0)
        for shapes in (((rank, width), (128, rank)) for rank in ranks)
    ]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hidden = torch.randn(2, 9, width, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = lora_linears(hidden, linears)
    assert {each.dtype for each in outputs} == {dtype}
    beside = [each for each in kept if not isinstance(each, nn.Parameter)]
    assert len(kept) == len(beside) + 4
    assert (
        sum(each.numel() * each.element_size() for each in beside) == num_rows * (width + sum(ranks)) * dtype.itemsize
    )
    outputs[0].float().sum().backward()
    assert linears[0].down.grad.dtype == torch.float32
    assert hidden.grad.dtype == dtype


@pytest.mark.parametrize("kind", [PLAIN, NESTED])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(kind: str, bias: bool) -> None:
    linears = [_linear(64, 64, 4, kind=kind, bias=bias), _linear(64, 128, 4, kind=kind, bias=bias)]
    hidden = torch.randn(2, 5, 64, requires_grad=True)
    ours = lora_linears(hidden, linears)
    expected = _expected(hidden, linears, [_weight(each.base) for each in linears])
    found, right = (
        torch.autograd.grad([outputs[0].mul_(3).sum(), outputs[1].tanh_().sum()], hidden)
        for outputs in (ours, expected)
    )
    _assert_close(found, right)
