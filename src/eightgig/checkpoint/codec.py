"""Nested state (as of optimizers and gradient scalers) as JSON plus tensors: nothing is ever pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_MAP = "__map__"


def to_json_and_tensors(state: Any, prefix: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """`state` split into what JSON can hold and a flat dict of CPU tensors; `from_json_and_tensors` puts it together.

    Dicts with any keys of str or int, lists, tuples, numbers, strings, booleans, None and tensors are taken.

    Raises:
        TypeError: on anything else, rather than storing it in part.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # A copy, since optimizers share tables between parameters and safetensors refuses shared memory.
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: path}
        if isinstance(value, Mapping):
            return {_MAP: [[key, encode(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {_TUPLE: [encode(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, list):
            return [encode(item, f"{path}.{index}") for index, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path} holds a {type(value).__name__}, which a checkpoint can't store")

    return encode(state, prefix), tensors


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in `state`, as `to_json_and_tensors` would have them stored."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def from_json_and_tensors(encoded: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `to_json_and_tensors` took apart."""
    if isinstance(encoded, list):
        return [from_json_and_tensors(item, tensors) for item in encoded]
    if isinstance(encoded, dict):
        if _TENSOR in encoded:
            return tensors[encoded[_TENSOR]]
        if _TUPLE in encoded:
            return tuple(from_json_and_tensors(item, tensors) for item in encoded[_TUPLE])
        return {key: from_json_and_tensors(item, tensors) for key, item in encoded[_MAP]}
    return encoded
