"""Linear layers with LoRA adapters that share an input, as one autograd function.

PEFT runs each adapter by itself: it copies the input to the adapter's dtype and keeps the copy, and every step of every
layer is an operation of its own, with a node in autograd's graph. Here all layers that take the same input are one
node, which keeps that input and what the A matrices make of it, computes in the input's dtype, and adds in place.

Shapes: X [N, in], the rows of hidden [..., in]; A [rank, in], B [out, rank], W [out, in], Y = X Wᵀ + b + s (X Aᵀ) Bᵀ.
Source of the formula: arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A frozen linear layer and its adapter.

    Attributes:
        base: an `nn.Linear` or bitsandbytes' `Linear4bit`. The backward pass asks it for its weight anew, which may lie
            in a buffer that held another layer's in between (`memory.weight_ring`).
        down: A, [rank, in], in any floating dtype.
        up: B, [out, rank].
        scaling: of what the adapter adds.
    """

    base: nn.Module
    down: Tensor
    up: Tensor
    scaling: float


def lora_linears(hidden: Tensor, linears: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """What each of `linears` makes of `hidden` [..., in]: [..., out], all in its dtype, in which they compute.

    Gradients of adapters have the adapters' dtype. Frozen weights get none, and are unpacked once a pass.
    """
    adapters = [*(each.down for each in linears), *(each.up for each in linears)]
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(linears, hidden, *adapters)  # type: ignore[no-untyped-call]
    return outputs


class _LoraLinears(torch.autograd.Function):
    """Its inputs: the layers, what they share, all A matrices, then all B matrices."""

    @staticmethod
    def forward(ctx: Any, linears: Sequence[LoraLinear], hidden: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        stacked, *ups = _cast(adapters, hidden.dtype)
        projected = _rows(hidden) @ stacked.t()
        outputs = []
        for linear, up, part in zip(linears, ups, _of_each(projected, linears), strict=True):
            output = linear.base(hidden)  # without a graph: a tensor of its own
            output.view(-1, output.shape[-1]).addmm_(part, up.t(), alpha=linear.scaling)
            if output._is_view():  # of its rows, where there is a bias: a model could not change it in place
                output = torch.ops.aten._unsafe_view.default(output, output.shape)
            outputs.append(output)
        ctx.save_for_backward(hidden, projected, *adapters)
        ctx.linears = linears
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, projected, *adapters = ctx.saved_tensors
        _, hidden_learns, *learns = ctx.needs_input_grad
        # An output that nothing was made of has no gradient; then its layer takes no part.
        reached = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if not reached:
            return (None,) * len(ctx.needs_input_grad)
        linears = [ctx.linears[place] for place in reached]
        rows = [_rows(gradient) for gradient in gradients if gradient is not None]
        of_each = _of_each(projected, ctx.linears)
        parts = [of_each[place] for place in reached]
        places = [*reached, *(len(gradients) + place for place in reached)]
        stacked, *ups = _cast([adapters[place] for place in places], hidden.dtype)
        inner = projected.new_empty(projected.shape[0], stacked.shape[0])  # gradients of X Aᵀ
        for part, row, up, linear in zip(_of_each(inner, linears), rows, ups, linears, strict=True):
            part.addmm_(row, up, beta=0, alpha=linear.scaling)
        found = [*_of_each(inner.t() @ _rows(hidden), linears, dim=0)]
        for row, part, up, linear in zip(rows, parts, ups, linears, strict=True):
            found.append(torch.empty_like(up).addmm_(row.t(), part, beta=0, alpha=linear.scaling))
        fresh = {place: torch.empty_like(adapters[place]) for place in places}
        torch._foreach_copy_(list(fresh.values()), found)
        for_hidden = _hidden_gradient(rows, linears, inner, stacked).view(hidden.shape) if hidden_learns else None
        return None, for_hidden, *(fresh.get(place) if wanted else None for place, wanted in enumerate(learns))


def _rows(tensor: Tensor) -> Tensor:
    """`tensor` [..., width] as [rows, width]."""
    return tensor.reshape(-1, tensor.shape[-1])


def _of_each(tensor: Tensor, linears: Sequence[LoraLinear], dim: int = 1) -> tuple[Tensor, ...]:
    """The parts of `tensor` that belong to the adapters, whose ranks lie side by side in `dim`."""
    return torch.split(tensor, [linear.down.shape[0] for linear in linears], dim=dim)


def _cast(adapters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All A matrices in one, [sum of ranks, in], and each B matrix, in `dtype`: one kernel fills them."""
    count = len(adapters) // 2
    downs, ups = adapters[:count], adapters[count:]
    ranks = [down.shape[0] for down in downs]
    stacked = downs[0].new_empty(sum(ranks), downs[0].shape[1], dtype=dtype)
    cast = [torch.empty_like(up, dtype=dtype) for up in ups]
    torch._foreach_copy_([*torch.split(stacked, ranks), *cast], [*adapters])
    return [stacked, *cast]


def _hidden_gradient(rows: Sequence[Tensor], linears: Sequence[LoraLinear], inner: Tensor, stacked: Tensor) -> Tensor:
    """Gradient of X, [N, in]: of one unpacked weight at a time."""
    total = inner @ stacked
    for row, linear in zip(rows, linears, strict=True):
        total.addmm_(row, _weight(linear.base, row.dtype))
    return total


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a frozen layer as it is now, [out, in] in `dtype`."""
    weight: Tensor = base.weight.detach()
    if isinstance(base, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(weight.view(-1, 1), base.weight.quant_state)
    return weight.to(dtype)
