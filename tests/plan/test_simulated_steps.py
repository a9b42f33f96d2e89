"""Steps that are written down again give the trace that simulating each of them gives, event by event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.models.precision import Precision
from eightgig.plan.simulate import Simulation, Simulator
from eightgig.plan.workload import LargestWorkloads
from eightgig.registry import resolve

PRECISIONS = {
    dtype: Precision(compute_dtype=dtype, mixed_precision=mixed, note=None)
    for dtype, mixed in ((torch.bfloat16, MixedPrecision.BF16), (torch.float16, MixedPrecision.FP16))
}


def assert_equal(found: Simulation, expected: Simulation) -> None:
    assert found.trace.marks == expected.trace.marks
    assert found.trace.sizes_bytes == expected.trace.sizes_bytes
    assert found.trace.blocks == expected.trace.blocks
    assert found.micro_batch_costs == expected.micro_batch_costs
    assert found.update_costs == expected.update_costs


def configs_of(model: str, method: str) -> list[TrainingConfig]:
    """Runs that have an update in common, or don't, one after the other and again."""
    trainings: list[dict[str, Any]] = [
        {},
        {"batch_size": 2, "gradient_accumulation_steps": 1},
        {"optimizer": "adamw", "loss_chunk_tokens": 16},
        {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "adamw", "batch_size": 2},
    ]
    levers: list[dict[str, Any]] = [{}, {"gradient_checkpointing": False}]
    if method == "qlora":
        levers += [{"offload_layer_inputs": True}, {"streamed_layers": 4}]
    return [
        TrainingConfig.model_validate(
            {
                "model": {"name": model},
                "data": {"max_length": 40},
                "training": {"method": method, "gradient_accumulation_steps": 3, **training},
                "hardware": hardware,
            }
        )
        for i, hardware in enumerate(levers)
        for training in (trainings if i == 0 else trainings[:2])
    ]


@pytest.mark.parametrize(
    ("method", "dtype"), [("qlora", torch.bfloat16), ("qlora", torch.float16), ("lora", torch.bfloat16)]
)
def test_runs_on_one_model(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = str(build_tiny_llava(tmp_path / "model", image_px=32, num_layers=5))
    configs, spec = configs_of(model, method), resolve(model)
    workload_of = LargestWorkloads(spec)
    processor = workload_of(configs[0]).processor
    remembering, simulating_all = (
        Simulator(configs[0], spec, processor, PRECISIONS[dtype], (9, 0), remembers_layers=remembers)
        for remembers in (True, False)
    )
    for config in configs:
        work = workload_of(config)
        for validates in (False, True) if config is configs[0] else (False,):
            found = remembering.run(config, work, validates=validates)
            assert_equal(found, simulating_all.run(config, work, validates=validates))
