"""Modules that run in fp32 inside an fp16 model, because what they compute leaves the range of fp16."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn


def run_in_fp32(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make the modules whose paths match one of `patterns` in full store and compute in fp32.

    What goes in is widened, what comes out has its old dtype. 4-bit weights and embeddings keep their storage: a 4-bit
    layer multiplies in its own compute dtype (in fp32 where it matches itself) and gives back the dtype it was given,
    and a looked-up row is widened at the border. The forward of each instance is wrapped.
    """
    matched = [
        module
        for pattern in patterns
        for path, module in list(model.named_modules())
        if re.fullmatch(pattern, path) is not None
    ]
    for module in matched:
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            continue
        dtype = next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)
        _widen(module)
        module.forward = _bordered(module.forward, dtype)


def _widen(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if not isinstance(parameter, Params4bit) and parameter.is_floating_point():
                setattr(part, name, nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, buffer.float())


def _bordered(forward: Any, dtype: torch.dtype) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return _cast(
            forward(*_cast(args, dtype, torch.float32), **_cast(kwargs, dtype, torch.float32)), torch.float32, dtype
        )

    return wrapped


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """`value` with every tensor of dtype `source` in it as `target`; model outputs keep their class."""
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _cast(value[key], source, target)
        return value
    if type(value) in (list, tuple):
        return type(value)(_cast(item, source, target) for item in value)
    return value
