"""Operations on fake tensors whose outcome is known: made anew from what the same operation gave before.

To work out an operation's outcome takes long, and a simulated run has tens of thousands of them, most with the same
shapes over and over. What an operation returns follows from its arguments' shapes, strides and dtypes
and from its plain values; so it is asked once for each such key.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU = torch.device("cpu")  # where all fake tensors of a simulation claim to lie
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_UNFORESEEABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class _Effect(Enum):
    """What an operation does to tensors: how its outcome can be told."""

    CHANGES_ARGUMENTS = "it changes its arguments' content and returns nothing"
    CHANGES_FIRST = "it changes its first argument's content and returns that"
    MAKES_TENSORS = "it changes nothing, and returns new tensors or views"
    OTHER = "anything else"


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that an operation returned.

    Attributes:
        place: of the argument whose storage it shares, None where the storage is its own.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    place: int | None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What an operation returned: one tensor, or a sequence of `kind`."""

    made: tuple[_Made, ...]
    kind: type | None


class FakeOps:
    """Calls operations on fake tensors, and remembers what they give."""

    def __init__(self) -> None:
        self._known: dict[Any, _Outcome | None] = {}

    def call(self, func: Any, types: Sequence[type], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """What `func(*args, **keywords)` returns; `types`: of the tensors among its arguments."""
        if FakeTensor not in types:
            return func(*args, **keywords)
        effect = _effect(func)
        if effect is _Effect.CHANGES_ARGUMENTS:
            return None
        if effect is _Effect.CHANGES_FIRST and type(args[0]) is FakeTensor:
            return args[0]
        if effect is not _Effect.MAKES_TENSORS:
            return func(*args, **keywords)
        tensors: list[Tensor] = []
        try:
            key = (func, _key(args, tensors), *((name, _key(keywords[name], tensors)) for name in keywords))
        except _Unforeseeable:
            return func(*args, **keywords)
        if key in self._known:
            known = self._known[key]
            return func(*args, **keywords) if known is None else _make(known, tensors)
        output = func(*args, **keywords)
        self._known[key] = _outcome(output, tensors)
        return output


def fresh_fake(mode: FakeTensorMode, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> FakeTensor:
    """A fake tensor with a storage of its own, as large as it has to be."""
    with torch._C._DisableTorchDispatch():
        return FakeTensor(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), _CPU)


def span_bytes(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes from the first to the last element of a tensor that lies so."""
    if 0 in size:
        return 0
    last = sum((each - 1) * step for each, step in zip(size, stride, strict=True))
    return (last + 1) * dtype.itemsize


@functools.cache
def _effect(func: Any) -> _Effect:
    if not isinstance(func, OpOverload) or _UNFORESEEABLE & set(func.tags):
        return _Effect.OTHER
    returns, arguments = func._schema.returns, func._schema.arguments
    if not returns:
        return _Effect.CHANGES_ARGUMENTS
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    if not any(written):
        makes = all("Tensor" in str(returned.type) for returned in returns)
        return _Effect.MAKES_TENSORS if makes else _Effect.OTHER
    is_returned = len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write
    return _Effect.CHANGES_FIRST if is_returned and written[0] and sum(written) == 1 else _Effect.OTHER


class _Unforeseeable(Exception):
    """An argument by which the outcome can't be told."""


def _key(value: Any, tensors: list[Tensor]) -> Any:
    """What of an argument decides the outcome; the tensors in it are added to `tensors`."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:  # it has a value, and what is made of it may have one
            raise _Unforeseeable
        tensors.append(value)
        return (value.shape, value.stride(), value.storage_offset(), value.dtype)
    if kind is tuple or kind is list:
        return (kind, *[_key(each, tensors) for each in value])
    if isinstance(value, Tensor):
        tensors.append(value)
        return (kind, value.shape, value.stride(), value.storage_offset(), value.dtype, value.device)
    if isinstance(value, _PLAIN):
        return (kind, value)
    raise _Unforeseeable


def _outcome(output: Any, tensors: Sequence[Tensor]) -> _Outcome | None:
    """How to make `output` anew, None where that can't be told."""
    places = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(tensors)}
    kind = type(output) if isinstance(output, (tuple, list)) else None
    if kind not in (None, tuple, list):
        return None
    made, own = [], set()
    for tensor in output if kind else [output]:
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.fake_device != _CPU:
            return None
        storage = tensor.untyped_storage()
        place = places.get(storage._cdata)
        size, stride, offset, dtype = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype
        if place is not None:
            if type(tensors[place]) is not FakeTensor or any(tensor is each for each in tensors):
                return None
        else:
            if offset or storage.nbytes() != span_bytes(size, stride, dtype) or storage._cdata in own:
                return None
            own.add(storage._cdata)
        made.append(_Made(size, stride, offset, dtype, place))
    return _Outcome(tuple(made), kind)


def _make(outcome: _Outcome, tensors: Sequence[Tensor]) -> Any:
    mode = next(tensor for tensor in tensors if isinstance(tensor, FakeTensor)).fake_mode
    if outcome.kind is None:
        return _tensor(outcome.made[0], tensors, mode)
    return outcome.kind(_tensors(outcome.made, tensors, mode))


def _tensors(made: Sequence[_Made], tensors: Sequence[Tensor], mode: FakeTensorMode) -> Iterator[FakeTensor]:
    for each in made:
        yield _tensor(each, tensors, mode)


def _tensor(made: _Made, tensors: Sequence[Tensor], mode: FakeTensorMode) -> FakeTensor:
    if made.place is None:
        return fresh_fake(mode, made.size, made.stride, made.dtype)
    storage = tensors[made.place].untyped_storage()
    with torch._C._DisableTorchDispatch():
        view = torch.empty(0, dtype=made.dtype, device="meta")
        view.set_(storage, made.offset, made.size, made.stride)
        return FakeTensor(mode, view, _CPU)
