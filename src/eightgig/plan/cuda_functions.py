"""Functions that torch takes apart differently on a GPU than on the CPU, on which the simulated tensors lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def fuse_dropout(model: nn.Module) -> None:
    """Make each dropout of `model` the one kernel that it is on a GPU, by wrapping the forward of the instance.

    `at::dropout` (ATen/native/Dropout.cpp) goes to `native_dropout` on CUDA where 0 < p < 1: its mask has one byte an
    element, and the input is not kept. On the CPU the mask has the input's dtype, and is a chain of operations.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.forward = _fused(module)  # type: ignore[assignment, method-assign]


def _fused(module: nn.Dropout) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        if not module.training or module.inplace or not 0 < module.p < 1:
            return functional.dropout(input, module.p, module.training, module.inplace)
        output: Tensor = torch.native_dropout(input, module.p, True)[0]
        return output

    return forward
