"""Keeping tensors for a backward pass before what needs them has run; autograd functions keep their inputs after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeptTensors:
    """Tensors kept from now on, as autograd keeps what it saves, hooks of the surroundings included.

    It holds them, and what they hold, until its own end.
    """

    def __init__(self, *tensors: Tensor) -> None:
        anchor = torch.empty(0, requires_grad=True)
        # The output, not its `grad_fn`: that is Python's part of the node, which torch 2.11 does not keep alive by it;
        # "buffers are freed when PyNode dies" (`unpack_saved_variables` in torch/csrc/autograd/python_function.cpp).
        self._output: Tensor = _Keep.apply(anchor, *tensors)  # type: ignore[no-untyped-call]

    def hand_back(self) -> tuple[Tensor, ...]:
        """The tensors, through the hooks that they were kept with."""
        node: Any = self._output.grad_fn
        tensors: tuple[Tensor, ...] = node.saved_tensors
        return tensors


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise AssertionError("nothing depends on what was returned")
