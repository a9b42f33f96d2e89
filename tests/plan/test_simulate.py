"""The simulated run beside the same code on real tensors, and beside runs measured on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmarks.planned_runs
import pytest
import torch
from benchmarks.planned_comparison import comparison_row, read_measured
from benchmarks.planned_runs import BUILT, predict
from tests.tiny import build_tiny_llava

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import load_model
from eightgig.models.precision import Precision
from eightgig.plan.cuda_rules import LT_WORKSPACE_BYTES, WORKSPACE_BYTES, CudaRules
from eightgig.plan.host_memory import HostBatch
from eightgig.plan.recorder import Recorder
from eightgig.plan.simulate import simulate
from eightgig.plan.trace import FREED, MemoryTrace
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.step.build import build_compute, build_step

MEASURED = Path(benchmarks.planned_runs.__file__).parent / "results" / "planned_runs_measured_built.json"
CARD = (8, 6)
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
    if config.hardware.gradient_checkpointing:
        checkpoint_layers(loaded.model, spec.family.decoder_layers(loaded.model), preserve_rng_state=False)
    step = build_step(config, spec, loaded.model, build_compute(config, device, FP32), num_steps=2)
    batch = HostBatch.of(largest_workload(config, spec).batch)
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules(CARD))
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


@pytest.mark.parametrize(
    "hardware", [{}, {"embedding_on_host": True}, {"streamed_layers": 3}], ids=["plain", "embedding", "streamed"]
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_fake_tensors_take_what_real_ones_take(checkpointing: bool, hardware: dict[str, Any], tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(tmp_path / "model", image_px=32, num_layers=4))},
            "data": {"max_length": 48},
            "training": {
                "batch_size": 3,
                "gradient_accumulation_steps": 1,
                "optimizer": "adamw_8bit",
                "lora": {"dropout": 0.0},
            },
            "hardware": {"gradient_checkpointing": checkpointing, **hardware},
        }
    )
    spec = resolve(config.model.name)
    simulated = simulate(config, spec, largest_workload(config, spec), FP32, CARD)
    assert growth_of_training(simulated.trace) == growth_of_training(real_trace(config, spec))


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
    first, end = next((first, end) for name, first, end in trace.phases() if name == "validate")
    live: dict[int, int] = {}
    for block, size in list(trace)[first:end]:
        if size == FREED:
            live.pop(block)
        else:
            live[block] = size
    assert set(live.values()) <= {WORKSPACE_BYTES, LT_WORKSPACE_BYTES}


@pytest.mark.parametrize("name", ["smolvlm2-2.2b-2048", "qwen2-vl-2b-1024"])
def test_it_says_what_a_gpu_took(name: str) -> None:
    measured = read_measured([MEASURED])[name]
    row = comparison_row(predict(next(run for run in BUILT if run.name == name)), measured, None)
    assert row["num_tokens"] == measured["num_tokens"]
    assert abs(row["errors"]["allocated"]) < 0.01
    assert abs(row["errors"]["reserved"]) < 0.03
