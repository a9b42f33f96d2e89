"""Optimizer states survive the way through JSON and safetensors unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eightgig.checkpoint.codec import from_json_and_tensors, to_json_and_tensors

_scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
_keys = st.integers(0, 99) | st.text(max_size=4)
_states = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=12,
)


@given(_states)
def test_any_nested_state_comes_back_as_it_was(state: Any) -> None:
    encoded, tensors = to_json_and_tensors(state)
    restored = from_json_and_tensors(json.loads(json.dumps(encoded)), tensors)
    assert restored == state
    assert type(restored) is type(state)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.x holds a set"):
        to_json_and_tensors({"x": {1, 2}})


def _trained(make: Any, seed: int) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(96, 64, generator=generator)) for _ in range(2)]
    optimizer = make(parameters)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
        lambda parameters: AdamW8bit(parameters, lr=1e-2),
    ],
    ids=["adamw", "adamw_8bit"],
)
def test_a_restored_optimizer_takes_the_same_next_step(make: Any, tmp_path: Path) -> None:
    parameters, optimizer = _trained(make, seed=3)
    encoded, tensors = to_json_and_tensors(optimizer.state_dict())
    save_file(tensors, tmp_path / "state.safetensors")

    twins = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    twin_optimizer = make(twins)
    state = from_json_and_tensors(json.loads(json.dumps(encoded)), load_file(tmp_path / "state.safetensors"))
    twin_optimizer.load_state_dict(state)
    for parameter, twin in zip(parameters, twins, strict=True):
        parameter.grad = torch.ones_like(parameter)
        twin.grad = torch.ones_like(twin)
    optimizer.step()
    twin_optimizer.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)
