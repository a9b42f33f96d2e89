"""Remembered layers give the trace that simulating each gives, event by event."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import build_tiny_llava

from eightgig import registry
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.memory import layer_inputs
from eightgig.models.precision import Precision
from eightgig.plan import layer_memo
from eightgig.plan.allocator import AllocatorSettings, replay
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.layer_memo import LayerMemo
from eightgig.plan.layer_recording import record_layer
from eightgig.plan.recorder import Recorder
from eightgig.plan.simulate import Simulator, simulate
from eightgig.plan.trace import MemoryTrace
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, resolve
from tiny_family import all_tiny_families, build_tiny_family

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


def test_runs_on_one_simulator_are_those_on_their_own(tmp_path: Path) -> None:
    """Layers that are known from one run are played in the next where no setting that concerns them differs."""
    model = str(build_tiny_llava(tmp_path / "model", image_px=32, num_layers=4))
    base = {"model": {"name": model}, "data": {"max_length": 40}}
    configs = [
        TrainingConfig.model_validate({**base, "training": training, "hardware": hardware})
        for training in ({"batch_size": 2}, {"batch_size": 1, "optimizer": "adamw"}, {"loss_chunk_tokens": 16})
        for hardware in ({}, {"checkpointed_layers": 2}, {"checkpointed_layers": 3}, {"gradient_checkpointing": False})
    ]
    spec = resolve(model)
    works = [largest_workload(config, spec) for config in configs]
    shared = Simulator(configs[0], spec, works[0].processor, BF16, (9, 0))
    for config, work in zip(configs, works, strict=True):
        together, alone = shared.run(config, work), simulate(config, spec, work, BF16, (9, 0))
        assert together.trace.sizes_bytes == alone.trace.sizes_bytes
        assert together.trace.blocks == alone.trace.blocks
        assert together.trace.categories == alone.trace.categories
        assert together.micro_batch_costs == alone.micro_batch_costs
        assert together.update_costs == alone.update_costs


def with_levers(folder: Path, *, dropout: float = 0.1, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(folder, image_px=32, num_layers=5))},
            "data": {"max_length": 40},
            "training": {"gradient_accumulation_steps": 2, "lora": {"dropout": dropout}},
            "validation": {"num_generated": 0},
            "hardware": hardware,
        }
    )


@pytest.mark.parametrize(
    "hardware",
    [
        {"checkpointed_layers": 2},
        {"mlp_tile_tokens": 20, "tiled_projections": True},
        {"mlp_tile_tokens": 20},
        {"gradient_checkpointing": False, "mlp_tile_tokens": 20},
        {"fused_lora": True, "checkpointed_layers": 3},
        {"fused_lora": True, "mlp_tile_tokens": 20, "tiled_projections": True},
    ],
)
def test_a_model_with_levers_on_its_layers(hardware: dict[str, Any], tmp_path: Path) -> None:
    dropout = 0.0 if "fused_lora" in hardware else 0.1
    config = with_levers(tmp_path / "model", dropout=dropout, **hardware)
    assert_equal_traces(config, resolve(config.model.name))


@pytest.mark.parametrize("hardware", [{}, {"checkpointed_layers": 4, "mlp_tile_tokens": 20}])
def test_layer_inputs_on_the_host(hardware: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A played layer asks for its input when its backward pass begins, a few events early; the peaks are equal."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    config = with_levers(tmp_path / "model", offload_layer_inputs=True, **hardware)
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    remembered, whole = (
        simulate(config, spec, work, BF16, (9, 0), remembers_layers=remembers) for remembers in (True, False)
    )
    assert sorted(remembered.trace.sizes_bytes) == sorted(whole.trace.sizes_bytes)
    for expandable in (True, False):
        settings_ = AllocatorSettings(expandable_segments=expandable)
        assert replay(remembered.trace, settings_).phases == replay(whole.trace, settings_).phases
    assert remembered.micro_batch_costs == whole.micro_batch_costs


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


@pytest.mark.parametrize("hardware", [{"offload_layer_inputs": True}, {"gradient_checkpointing": False}])
def test_rows_in_groups(hardware: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal costs. autograd adds up the groups' gradients before it adds them to what a parameter has: until a layer is
    done it holds its gradients twice, and under a dispatch mode a third time, as it then adds nothing in place."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    config = with_levers(tmp_path / "model", **hardware)
    together = config.hardware.model_copy(update={"micro_batches_per_pass": 3})
    training = config.training.model_copy(update={"gradient_accumulation_steps": 6})
    config = config.model_copy(update={"hardware": together, "training": training})
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    remembered, whole = (
        simulate(config, spec, work, BF16, (9, 0), remembers_layers=remembers) for remembers in (True, False)
    )
    assert remembered.micro_batch_costs == whole.micro_batch_costs
    assert remembered.update_costs == whole.update_costs
    layer_gradients_bytes = 4 * config.training.lora.rank * (4 * (64 + 64) + 3 * (64 + 128))
    for ours, exact in zip(remembered.trace.live_bytes(), whole.trace.live_bytes(), strict=True):
        assert ours[0] == exact[0]
        assert ours[1] == pytest.approx(exact[1], abs=2 * layer_gradients_bytes)


def test_groups_that_differ_in_what_they_are_given(layers_that_share_keys: Path) -> None:
    """Rows of Gemma 4: masks have other contents in each group, and shared keys are put together and divided."""
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(layers_that_share_keys)},
            "data": {"max_length": 40},
            "training": {"gradient_accumulation_steps": 2},
            "validation": {"num_generated": 0},
            "hardware": {"micro_batches_per_pass": 2},
        }
    )
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    inputs = dict(work.batch.model_inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, -7:] = 0
    work = dataclasses.replace(work, batch=dataclasses.replace(work.batch, model_inputs=inputs))
    remembered, whole = (
        simulate(config, spec, work, BF16, (9, 0), remembers_layers=remembers) for remembers in (True, False)
    )
    assert remembered.micro_batch_costs == whole.micro_batch_costs
    for ours, exact in zip(remembered.trace.live_bytes(), whole.trace.live_bytes(), strict=True):
        assert ours[0] == exact[0]
        assert ours[1] == pytest.approx(exact[1], rel=0.01)


@pytest.fixture
def layers_that_share_keys(tmp_path: Path) -> Path:
    """A tiny Gemma 4 of twelve layers: the first half keeps its keys and values, the second takes those of two."""
    (tiny,) = (each for each in all_tiny_families() if each.name == "gemma4")
    layer_types = ["sliding_attention", "full_attention"] * 6
    text = {**tiny.facts.architecture["text_config"], "num_hidden_layers": 12, "layer_types": layer_types}
    text["num_kv_shared_layers"] = 6
    facts = dataclasses.replace(tiny.facts, architecture={**tiny.facts.architecture, "text_config": text})
    return build_tiny_family(dataclasses.replace(tiny, facts=facts), tmp_path / "model")


@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_that_share_keys_and_values(
    checkpointing: bool, layers_that_share_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of shared keys are added up when a layer ends, not within it: some events move, peaks hardly."""
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(layers_that_share_keys)},
            "data": {"max_length": 40},
            "training": {"batch_size": 2, "gradient_accumulation_steps": 2},
            "validation": {"num_generated": 0},
            "hardware": {"gradient_checkpointing": checkpointing},
        }
    )
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    num_recorded = 0

    def recorded(*args: Any) -> Any:
        nonlocal num_recorded
        num_recorded += 1
        return record_layer(*args)

    monkeypatch.setattr(layer_memo, "record_layer", recorded)
    remembered, whole = (
        simulate(config, spec, work, BF16, (9, 0), remembers_layers=remembers) for remembers in (True, False)
    )
    # Sliding or full; keys of its own, such as it leaves for others, or none: six kinds, each without gradients, with
    # its first and with later ones. And the very first layer, whose input needs none, has the last two of its own.
    assert num_recorded == 6 * 3 + 2
    assert remembered.micro_batch_costs == whole.micro_batch_costs
    assert len(remembered.trace.blocks) == len(whole.trace.blocks)
    settings_ = AllocatorSettings(expandable_segments=True)
    for mine, theirs in zip(
        replay(remembered.trace, settings_).phases, replay(whole.trace, settings_).phases, strict=True
    ):
        assert mine.name == theirs.name
        assert mine.allocated_bytes == pytest.approx(theirs.allocated_bytes, rel=0.003)


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
