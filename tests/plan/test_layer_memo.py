"""Remembered layers give the trace that simulating each gives, event by event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import build_tiny_llava

from eightgig import registry
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.models.precision import Precision
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.layer_memo import LayerMemo
from eightgig.plan.recorder import Recorder
from eightgig.plan.simulate import simulate
from eightgig.plan.trace import MemoryTrace
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, resolve

BF16 = Precision(compute_dtype=torch.bfloat16, mixed_precision=MixedPrecision.BF16, note=None)


def assert_equal_traces(config: TrainingConfig, spec: ModelSpec) -> None:
    work = largest_workload(config, spec)
    remembered = simulate(config, spec, work, BF16, (9, 0)).trace
    whole = simulate(config, spec, work, BF16, (9, 0), remembers_layers=False).trace
    assert remembered.marks == whole.marks
    assert remembered.sizes_bytes == whole.sizes_bytes
    assert remembered.blocks == whole.blocks


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("training", [{"method": "qlora"}, {"method": "lora"}, {"method": "full"}])
def test_a_tiny_model_of_six_layers(training: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(tmp_path / "model", image_px=32, num_layers=6))},
            "data": {"max_length": 40},
            "training": {"batch_size": 2, "gradient_accumulation_steps": 3, **training},
            "hardware": {"gradient_checkpointing": checkpointing},
        }
    )
    assert_equal_traces(config, resolve(config.model.name))


@pytest.mark.parametrize("model", ["smolvlm2-2.2b", "qwen3-vl-2b"])
def test_a_full_size_model(model: str) -> None:
    """Idefics' tower is frozen without a graph; Qwen3-VL adds the tower's features between the first layers."""
    config = TrainingConfig.model_validate(
        {
            "model": {"name": model},
            "data": {"max_length": 128},
            "training": {"gradient_accumulation_steps": 2, "lora": {"dropout": 0.05}},
            "validation": {"num_generated": 0},
        }
    )
    assert_equal_traces(config, registry.get(model))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_whose_weights_come_from_the_host(checkpointing: bool, tmp_path: Path) -> None:
    hardware = {"gradient_checkpointing": checkpointing, "streamed_layers": 4, "embedding_on_host": True}
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(tmp_path / "model", image_px=32, num_layers=6))},
            "data": {"max_length": 40},
            "training": {"batch_size": 2, "gradient_accumulation_steps": 3},
            "hardware": hardware,
        }
    )
    assert_equal_traces(config, resolve(config.model.name))


class _Layer(torch.nn.Module):
    """A layer that keeps some of its intermediate tensors and writes into others."""

    def __init__(self, width: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.first = torch.nn.Linear(width, 2 * width)
        self.second = torch.nn.Linear(2 * width, width, bias=False)
        self.second.weight.requires_grad = layer_idx % 2 == 0

    def forward(self, states: torch.Tensor, mask: torch.Tensor, shift: tuple[torch.Tensor, ...]) -> torch.Tensor:
        inner = torch.relu_(self.first(states + shift[0]))
        return states + self.second(inner).masked_fill(mask, 0.0) * shift[1]


class _Stack(torch.nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer(width, index) for index in range(depth))

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shift = torch.stack([torch.ones(states.shape[-1]), torch.full(states.shape[-1:], 0.5)]).unbind()
        for layer in self.layers:
            states = layer(states, mask, shift)
        return (states * 1.5).sum()  # a sum alone hands on one number, spread over the shape: no model ends in a layer


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 7), st.booleans(), st.integers(1, 3))
def test_layers_with_random_sizes(rows: int, width: int, depth: int, learns: bool, num_passes: int) -> None:
    traces = []
    for remembers in (True, False):
        with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            model = _Stack(width, depth)
            states = torch.empty(rows, width, requires_grad=learns)
            mask = torch.empty(rows, width, dtype=torch.bool)
        trace = MemoryTrace()
        recorder = Recorder(trace, CudaRules((8, 6)))
        with recorder:
            recorder._note([*model.parameters(), states, mask])
            if remembers:
                LayerMemo(recorder).wrap(model)
            for _ in range(num_passes):
                model(states, mask).backward()
            with torch.no_grad():
                model(states, mask)
        recorder.continue_in(MemoryTrace())
        traces.append(trace)
    assert traces[0].sizes_bytes == traces[1].sizes_bytes
    assert traces[0].blocks == traces[1].blocks
