"""The simulated run beside the same code on real tensors, and beside runs measured on a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import benchmarks.planned_runs
import pytest
import torch
from benchmarks.planned_comparison import comparison_row, read_measured
from benchmarks.planned_runs import BUILT, predict
from tests.plan.trace_reading import left_by
from tests.tiny import build_tiny_llava

from eightgig.checkpoint.store import write_checkpoint
from eightgig.checkpoint.training_state import training_state
from eightgig.config import Batching, MixedPrecision, TrainingConfig
from eightgig.memory import layer_inputs
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import load_model
from eightgig.models.packed_rows import pack_as_configured
from eightgig.models.precision import Precision
from eightgig.plan.cuda_rules import LT_WORKSPACE_BYTES, WORKSPACE_BYTES, CudaRules
from eightgig.plan.host_memory import HostBatch, HostCopies, HostTransfers
from eightgig.plan.op_costs import BESIDE
from eightgig.plan.recorder import Recorder
from eightgig.plan.simulate import simulate
from eightgig.plan.trace import FREED, MemoryTrace
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.step.build import (
    build_compute,
    build_step,
    checkpoint_as_configured,
    fuse_lora_as_configured,
    group_rows_as_configured,
    offload_as_configured,
    tile_as_configured,
)
from tiny_family import all_tiny_families, build_tiny_family

MEASURED = Path(benchmarks.planned_runs.__file__).parent / "results" / "planned_runs_measured_built.json"
CARD = (8, 6)
CPU = torch.device("cpu")
FP32 = Precision(compute_dtype=torch.float32, mixed_precision=MixedPrecision.FP32, note=None)


def growth_of_training(trace: MemoryTrace) -> list[int]:
    """For each phase `train`: the most bytes live beyond those at the first one's beginning."""
    peaks, sizes, live, base = [], {}, 0, None
    marks = dict(trace.marks)
    for index, (block, size) in enumerate(trace):
        if marks.get(index) == "train":
            base = live if base is None else base
            peaks.append(0)
        elif index in marks:
            base = base if base is None else -1
        if size == FREED:
            live -= sizes.pop(block)
        else:
            sizes[block] = size
            live += size
        if peaks and base != -1:
            peaks[-1] = max(peaks[-1], live - base)
    return peaks


def real_trace(config: TrainingConfig, spec: ModelSpec) -> MemoryTrace:
    """Two steps of `config` with real weights on the CPU, recorded."""
    device = torch.device("cpu")
    loaded = load_model(config, spec, device, FP32)
    attach_adapters(loaded, config)
    pack_as_configured(config, spec, loaded.model)
    fuse_lora_as_configured(config, spec, loaded.model)
    tile_as_configured(config, spec, loaded.model)
    checkpoint_as_configured(config, spec, loaded.model)
    step = build_step(config, spec, loaded.model, build_compute(config, device, FP32), num_steps=2)
    batch = HostBatch.of(largest_workload(config, spec).batch)
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules(CARD))
    offload_as_configured(config, spec, loaded.model, HostTransfers(recorder))
    group_rows_as_configured(config, spec, loaded.model)
    with recorder:
        recorder._note([*loaded.model.parameters(), *loaded.model.buffers()])  # else a view of one would count as new
        # The simulated run has its workspaces from validation.
        torch.addmm(torch.ones(1), torch.ones(1, 1), torch.ones(1, 1))
        for _ in range(2):
            trace.mark("train")
            step([batch], batch.num_target_tokens)
            step.apply(step.finish_gradients())
        trace.mark("end")
    return trace


def growth_of_saving(trace: MemoryTrace) -> int:
    """The most bytes live in the phase `save` beyond those at its beginning."""
    first = next(event for event, name in trace.marks if name == "save")
    sizes: dict[int, int] = {}
    live, lives = 0, [0]  # before each event, and after the last
    for block, size in trace:
        live -= sizes.pop(block) if size == FREED else -size
        if size != FREED:
            sizes[block] = size
        lives.append(live)
    return max(lives[first:]) - lives[first]


def real_save(config: TrainingConfig, spec: ModelSpec, folder: Path) -> MemoryTrace:
    """A checkpoint of `config` written after a step with real weights on the CPU, recorded."""
    loaded = load_model(config, spec, CPU, FP32)
    attach_adapters(loaded, config)
    model = loaded.model
    step = build_step(config, spec, model, build_compute(config, CPU, FP32), num_steps=2)
    batch = largest_workload(config, spec).batch
    step([batch], batch.num_target_tokens)
    step.apply(step.finish_gradients())
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules(CARD))
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    codes = [p.quant_state.state2.code for p in model.parameters() if hasattr(p, "quant_state")]
    with recorder:
        recorder._note([*model.parameters(), *model.buffers(), *states, *codes])
        trace.mark("save")
        with HostCopies(recorder):
            write_checkpoint(folder, step=1, model=model, state=training_state(step), fingerprint={})
    return trace


@pytest.mark.parametrize(("method", "codes"), [("qlora", 1), ("lora", 0), ("full", 0)])
def test_saving_takes_what_the_real_one_takes(method: str, codes: int, tmp_path: Path) -> None:
    """Of each 4-bit weight bitsandbytes copies the table of its scales, 256 numbers, on the card; all else is copied to
    the host.
    """
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(tmp_path / "model", image_px=32))},
            "data": {"max_length": 48},
            "training": {"method": method, "optimizer": "adamw_8bit"},
        }
    )
    spec = resolve(config.model.name)
    simulation = simulate(config, spec, largest_workload(config, spec), FP32, CARD)
    grown_bytes = growth_of_saving(simulation.trace)
    assert grown_bytes == growth_of_saving(real_save(config, spec, tmp_path / "checkpoints"))
    num_layers, weights_a_layer, table_bytes = 2, 7, 256 * 4
    assert grown_bytes == codes * num_layers * weights_a_layer * table_bytes


def settings_of(folder: Path, *, max_length: int = 48, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(folder, image_px=32, num_layers=6))},
            "data": {"max_length": max_length},
            "training": {
                "batch_size": 3,
                "gradient_accumulation_steps": 1,
                "optimizer": "adamw_8bit",
                "lora": {"dropout": 0.0},
            },
            "hardware": hardware,
        }
    )


def simulated_growth(config: TrainingConfig) -> list[int]:
    spec = resolve(config.model.name)
    return growth_of_training(simulate(config, spec, largest_workload(config, spec), FP32, CARD).trace)


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny layer inputs are offloaded too."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)


@pytest.mark.parametrize(
    "hardware",
    [
        {},
        {"gradient_checkpointing": False},
        {"checkpointed_layers": 4},
        {"offload_layer_inputs": True},
        {"offload_layer_inputs": True, "checkpointed_layers": 3, "mlp_tile_tokens": 20},
        {"mlp_tile_tokens": 50, "gradient_checkpointing": False},
        {"mlp_tile_tokens": 20, "tiled_projections": True, "offload_layer_inputs": True},
        {"mlp_tile_tokens": 50, "tiled_projections": True, "gradient_checkpointing": False},
        {"embedding_on_host": True},
        {"embedding_on_host": True, "gradient_checkpointing": False},
        {"streamed_layers": 3},
        {"streamed_layers": 3, "gradient_checkpointing": False},
        {"fused_lora": True},
        {"fused_lora": True, "gradient_checkpointing": False},
        {"fused_lora": True, "streamed_layers": 4, "offload_layer_inputs": True, "mlp_tile_tokens": 20},
        {"fused_lora": True, "mlp_tile_tokens": 50, "tiled_projections": True, "checkpointed_layers": 4},
        {"streamed_layers": 4, "offload_layer_inputs": True, "checkpointed_layers": 4, "mlp_tile_tokens": 20},
    ],
)
@pytest.mark.usefixtures("every_size")
def test_fake_tensors_take_what_real_ones_take(hardware: dict[str, Any], tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", **hardware)
    assert simulated_growth(config) == growth_of_training(real_trace(config, resolve(config.model.name)))


@pytest.mark.parametrize("hardware", [{}, {"gradient_checkpointing": False}, {"mlp_tile_tokens": 50}])
def test_a_shared_row_takes_what_a_real_one_takes(hardware: dict[str, Any], tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", **hardware)
    config = config.model_copy(update={"training": config.training.model_copy(update={"batching": Batching.PACKED})})
    spec = resolve(config.model.name)
    row, plain = largest_workload(config, spec).batch, largest_workload(settings_of(tmp_path / "plain"), spec).batch
    assert len(row.segment_lengths) > len(plain.labels)
    assert row.num_computed_tokens == plain.num_tokens
    assert simulated_growth(config) == growth_of_training(real_trace(config, spec))


@pytest.mark.parametrize("name", ["instructblip", "qwen2_vl", "qwen3_vl", "smolvlm"])
def test_a_shared_row_of_other_families_takes_what_a_real_one_takes(name: str, tmp_path: Path) -> None:
    """Positions that a model works out from values are worked out on the host, where values are."""
    (tiny,) = (each for each in all_tiny_families() if each.name == name)
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_family(tiny, tmp_path / "model"))},
            "data": {"max_length": 96},
            "training": {
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "optimizer": "adamw_8bit",
                "batching": "packed",
            },
        }
    )
    spec = resolve(config.model.name)
    assert simulated_growth(config) == growth_of_training(real_trace(config, spec))


@pytest.mark.parametrize(
    "hardware",
    [
        {},
        {"gradient_checkpointing": False},
        {"streamed_layers": 4, "offload_layer_inputs": True, "checkpointed_layers": 4, "mlp_tile_tokens": 20},
    ],
)
@pytest.mark.usefixtures("every_size")
def test_micro_batches_that_share_a_pass_take_what_real_ones_take(hardware: dict[str, Any], tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", **hardware)
    training = config.training.model_copy(update={"batch_size": 2, "gradient_accumulation_steps": 4})
    together = config.hardware.model_copy(update={"micro_batches_per_pass": 4})
    config = config.model_copy(update={"training": training, "hardware": together})
    spec = resolve(config.model.name)
    assert len(largest_workload(config, spec).samples) == 8
    assert simulated_growth(config) == growth_of_training(real_trace(config, spec))


def test_a_tower_in_4_bits_takes_what_a_real_one_takes(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model")
    quantization = config.training.quantization.model_copy(update={"vision_tower": True})
    config = config.model_copy(update={"training": config.training.model_copy(update={"quantization": quantization})})
    assert simulated_growth(config) == growth_of_training(real_trace(config, resolve(config.model.name)))


def test_each_layer_that_is_checkpointed_takes_the_same_off_the_peak(tmp_path: Path) -> None:
    peaks = [
        max(simulated_growth(settings_of(tmp_path / f"{n}", max_length=400, checkpointed_layers=n)))
        for n in range(3, 7)
    ]
    steps = [before - after for before, after in itertools.pairwise(peaks)]
    assert len(set(steps[:-1])) == 1
    assert 0 <= steps[-1] < steps[0]  # one layer's activations are there in any case, if not beside the loss's


@pytest.mark.usefixtures("every_size")
def test_offload_takes_all_layer_inputs_but_the_last_off_the_peak(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", max_length=400, mlp_tile_tokens=200)
    hardware = config.hardware.model_copy(update={"offload_layer_inputs": True})
    batch = largest_workload(config, resolve(config.model.name)).batch
    input_bytes = batch.model_inputs["input_ids"].numel() * 64 * torch.float32.itemsize
    saved = max(simulated_growth(config)) - max(simulated_growth(config.model_copy(update={"hardware": hardware})))
    assert saved == 5 * input_bytes


@pytest.mark.usefixtures("every_size")
def test_offload_moves_each_layer_input_but_the_last_to_the_host_and_back(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", offload_layer_inputs=True)
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    costs = simulate(config, spec, work, FP32, CARD).micro_batch_costs
    input_bytes = work.batch.model_inputs["input_ids"].numel() * 64 * torch.float32.itemsize
    assert {cost.moved_bytes: count for cost, count in costs.items() if cost.kind == BESIDE} == {input_bytes: 2 * 5}


@pytest.mark.usefixtures("every_size")
def test_the_smaller_the_tiles_the_less_a_layer_takes(tmp_path: Path) -> None:
    """With layer inputs on the host, since else the loss takes the most, beside all of them."""
    settings = {"max_length": 400, "offload_layer_inputs": True}
    peaks = [
        max(simulated_growth(settings_of(tmp_path / f"{tile}", mlp_tile_tokens=tile, **settings)))
        for tile in (None, 900, 600)
    ]
    assert peaks == sorted(set(peaks), reverse=True)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("tile_tokens", [300, 600])
def test_projections_in_tiles_take_less_than_mlps_alone(tile_tokens: int, tmp_path: Path) -> None:
    """With texts so long that a layer takes more than a chunk of the loss."""
    settings = {"max_length": 1500, "offload_layer_inputs": True, "mlp_tile_tokens": tile_tokens}
    alone, with_them = (
        max(simulated_growth(settings_of(tmp_path / f"{tiled}", tiled_projections=tiled, **settings)))
        for tiled in (False, True)
    )
    assert with_them < alone


def test_of_a_validation_only_the_workspaces_stay(tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(tmp_path / "model", image_px=32))},
            "data": {"max_length": 48},
            "training": {"batch_size": 3, "gradient_accumulation_steps": 1},
            "validation": {"num_generated": 1},
        }
    )
    spec = resolve(config.model.name)
    trace = simulate(config, spec, largest_workload(config, spec), FP32, CARD).trace
    assert set(left_by(trace, "validate").values()) <= {WORKSPACE_BYTES, LT_WORKSPACE_BYTES}


@pytest.mark.parametrize("name", ["smolvlm2-2.2b-2048", "qwen2-vl-2b-1024"])
def test_it_says_what_a_gpu_took(name: str) -> None:
    measured = read_measured([MEASURED])[name]
    row = comparison_row(predict(next(run for run in BUILT if run.name == name)), measured, "built", None)
    assert row["num_tokens"] == measured["num_tokens"]
    assert abs(row["errors"]["allocated"]) < 0.01
    assert abs(row["errors"]["reserved"]) < 0.03
