"""Keeping tensors for a backward pass before what needs them has run; autograd functions keep their inputs after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_from_now(*tensors: Tensor) -> Any:
    """Keep `tensors` as autograd keeps what it saves, hooks of the surroundings included.

    `saved_tensors` of what is returned hands them back. It holds them, and what they hold, until its own end.
    """
    anchor = torch.empty(0, requires_grad=True)
    return _Keep.apply(anchor, *tensors).grad_fn  # type: ignore[no-untyped-call]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise AssertionError("nothing depends on what was returned")
