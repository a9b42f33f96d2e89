"""What makes two calls of two layers allocate the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

_PLAIN = (bool, int, float, str, torch.dtype, type(None))
_NUMBERING = frozenset({"layer_idx", "layer_index", "layer_number", "layer_id"})
"""Attributes that tell a layer its place, and change nothing about what it allocates without a key-value cache."""
ALIGNMENT_BYTES = 16  # of the widest load of a CUDA thread
_DIGESTS = WeakTensorKeyDictionary()  # of tensors as they were at some version: (version, digest)


class Unlike(Exception):
    """The call has an argument whose effect on allocations is not known."""


def module_signature(layer: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[Any, ...]:
    """Classes, plain attributes, parameters and buffers of `layer` and all in it, and which gradients it has.

    `parameters` are those of `layer`, which takes long to find out.
    """
    known = layer.__dict__.get("_planned_signature")
    if known is None:
        known = tuple(_of_module(name, module) for name, module in layer.named_modules())
        object.__setattr__(layer, "_planned_signature", known)
    return (known, layer.training, tuple(parameter.grad is not None for parameter in parameters))


def forward_signature(forward: Callable[..., Any]) -> tuple[Any, ...]:
    """The code of `forward` and of all that it wraps (`functools.wraps`): checkpointed layers are unlike whole ones."""
    code = []
    inner: Any = forward
    while inner is not None:
        code.append(getattr(inner, "__code__", type(inner)))  # that of a method is its function's
        inner = getattr(inner, "__wrapped__", None)
    return tuple(code)


def arguments_signature(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes, strides, alignment and dtypes of tensors, values of all else and of such tensors as have them; which
    share a storage.

    Raises:
        Unlike: one is neither a tensor nor a plain value.
    """
    groups: dict[int, int] = {}
    return tuple(_of_argument(leaf, groups) for leaf in leaves)


def _of_module(name: str, module: nn.Module) -> tuple[Any, ...]:
    return (
        name,
        type(module),
        tuple(_plain_attributes(module)),
        tuple(_of_tensor(key, value) for key, value in module.named_parameters(recurse=False)),
        tuple(_of_tensor(key, value) for key, value in module.named_buffers(recurse=False)),
    )


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(module).items()):
        if name in _NUMBERING or name == "training":
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif isinstance(value, Mapping) and value and all(isinstance(each, _PLAIN) for each in value.values()):
            yield name, tuple(value.items())


def _of_tensor(name: str, tensor: Tensor) -> tuple[Any, ...]:
    state = getattr(tensor, "quant_state", None)
    quantised = None if state is None else (tuple(state.shape), state.blocksize, state.quant_type, state.nested)
    return (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, quantised)


def _of_argument(leaf: Any, groups: dict[int, int]) -> Any:
    if not isinstance(leaf, Tensor):
        if not isinstance(leaf, _PLAIN):
            raise Unlike(type(leaf).__name__)
        return (type(leaf), leaf)
    group = groups.setdefault(leaf.untyped_storage()._cdata, len(groups))
    content = None if isinstance(leaf, FakeTensor) else _digest(leaf)
    # Which part of a storage a layer is given (Gemma 4 cuts one tensor up for its layers) changes nothing, but kernels
    # may be chosen by how it is aligned.
    misaligned_bytes = leaf.storage_offset() * leaf.dtype.itemsize % ALIGNMENT_BYTES
    return (group, tuple(leaf.shape), leaf.stride(), misaligned_bytes, leaf.dtype, leaf.requires_grad, content)


def _digest(tensor: Tensor) -> bytes:
    """Of its content; worked out once for the many layers that are given the same tensor."""
    if tensor not in _DIGESTS or _DIGESTS[tensor][0] != tensor._version:
        _DIGESTS[tensor] = (tensor._version, _new_digest(tensor))
    digest: bytes = _DIGESTS[tensor][1]
    return digest


def _new_digest(tensor: Tensor) -> bytes:
    values = tensor.detach().contiguous().view(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()
