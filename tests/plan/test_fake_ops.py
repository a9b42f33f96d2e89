"""What is made from memory is what the fake tensors say themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from eightgig.plan.fake_ops import FakeOps

aten = torch.ops.aten

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

CALLS: dict[str, Callable[[Tensor], Call]] = {
    "new": lambda x: (aten.zeros_like.default, (x,), {"dtype": torch.uint8}),
    "strides kept": lambda x: (aten.mul.Tensor, (x, 2.0), {}),
    "broadcast": lambda x: (aten.add.Tensor, (x, torch.ones(3, 1, 1)), {}),
    "product": lambda x: (aten.bmm.default, (x, x.transpose(1, 2)), {}),
    "two": lambda x: (aten.max.dim, (x, 1), {}),
    "norm": lambda x: (aten.linalg_vector_norm.default, (x, 2.0), {}),
    "cast": lambda x: (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
    "view": lambda x: (aten.transpose.int, (x, 0, 2), {}),
    "part": lambda x: (aten.slice.Tensor, (x, 1, 1, 9), {}),
    "parts": lambda x: (aten.split.Tensor, (x, 1, 2), {}),
    "expanded": lambda x: (aten.expand.default, (aten.unsqueeze.default(x, 0), [5, -1, -1, -1]), {}),
    "list": lambda x: (aten.cat.default, ([x, x], 1), {}),
    "nothing left": lambda x: (aten.slice.Tensor, (x, 2, 0, 0), {}),
}


def laid(mode: FakeTensorMode, sizes: tuple[int, int, int], order: tuple[int, ...], skipped: int) -> Tensor:
    """A fake tensor of `sizes` permuted by `order`, without the first `skipped` of its rows."""
    with mode:
        return torch.empty(sizes[0] + skipped, *sizes[1:])[skipped:].permute(order)


def told(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(CALLS)),
    st.tuples(st.just(3), st.integers(1, 6), st.integers(1, 6)),
    st.permutations((0, 1, 2)),
    st.integers(0, 2),
)
def test_the_second_outcome_is_that_of_the_first(
    name: str, sizes: tuple[int, int, int], order: list[int], skipped: int
) -> None:
    sizes = tuple(sizes[order.index(place)] for place in range(3))  # so that the first is 3 behind `order`
    mode, ops = FakeTensorMode(allow_non_fake_inputs=True), FakeOps()
    for _ in range(2):
        x = laid(mode, sizes, tuple(order), skipped)
        func, args, keywords = CALLS[name](x)
        expected = func(*args, **keywords)
        found = ops.call(func, [FakeTensor], args, keywords)
        assert type(found) is type(expected)
        pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
        for one, other in pairs:
            assert type(one) is FakeTensor
            assert told(one) == told(other)
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
            shares = one.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert shares == (other.untyped_storage()._cdata == x.untyped_storage()._cdata)


@pytest.mark.parametrize("value", [1, 1.0, True])
def test_equal_numbers_of_other_kinds_are_told_apart(value: float) -> None:
    mode, ops = FakeTensorMode(), FakeOps()
    with mode:
        whole = torch.empty(4, dtype=torch.int64)
    for other in (1, 1.0, True, value):
        found = ops.call(aten.mul.Tensor, [FakeTensor], (whole, other), {})
        assert found.dtype == aten.mul.Tensor(whole, other).dtype


def test_what_changes_content_alone_is_not_asked_and_what_changes_a_shape_is() -> None:
    mode, ops = FakeTensorMode(), FakeOps()
    with mode:
        states = torch.empty(2, 3)
    assert ops.call(aten.mul_.Tensor, [FakeTensor], (states, 2.0), {}) is states
    assert ops.call(aten._foreach_mul_.Scalar, [FakeTensor], ([states], 2.0), {}) is None
    ops.call(aten.unsqueeze_.default, [FakeTensor], (states, 0), {})
    assert tuple(states.shape) == (1, 2, 3)


def test_real_tensors_are_changed() -> None:
    counts = torch.zeros(2)
    FakeOps().call(aten.add_.Tensor, [], (counts, 1), {})
    FakeOps().call(aten._foreach_add_.Scalar, [], ([counts], 1), {})
    assert counts.tolist() == [2.0, 2.0]
