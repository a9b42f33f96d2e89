"""Keeping tensors ahead: they are there as long as what keeps them, in whatever way torch ends a node."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from eightgig.memory.kept_tensors import KeptTensors


def test_a_tensor_reaches_the_node_that_kept_it() -> None:
    """Torch 2.11 frees what a node saved when no tensor leads to it any more; torch 2.13 does not."""
    first, second = torch.arange(3.0), torch.ones(2, 2)
    kept = KeptTensors(first, second)
    assert isinstance(kept._output, Tensor)
    assert kept._output.grad_fn is not None
    assert all(torch.equal(*pair) for pair in zip(kept.hand_back(), (first, second), strict=True))
    assert all(torch.equal(*pair) for pair in zip(kept.hand_back(), (first, second), strict=True))


def test_what_is_kept_goes_with_it() -> None:
    storage = (tensor := torch.ones(4)).untyped_storage()
    gone = weakref.ref(storage)
    kept = KeptTensors(tensor)
    del tensor, storage
    assert gone() is not None
    del kept
    assert gone() is None


@pytest.mark.parametrize("kinds", [1, 3])
def test_hooks_of_the_surroundings_take_over(kinds: int) -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index] + 1):
        kept = KeptTensors(*(torch.full((2,), float(kind)) for kind in range(kinds)))
    assert len(packed) == kinds
    assert [tensor.tolist() for tensor in kept.hand_back()] == [[kind + 1.0] * 2 for kind in range(kinds)]
