"""What the blocks at a run's peak are for, against counts made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.models.precision import Precision
from eightgig.plan import categories
from eightgig.plan.plan import plan
from eightgig.plan.simulate import Simulator
from eightgig.plan.trace import MemoryTrace
from eightgig.plan.workload import largest_workload
from eightgig.registry import resolve
from eightgig.registry.gpus import get_gpu

BF16 = Precision(compute_dtype=torch.bfloat16, mixed_precision=MixedPrecision.BF16, note=None)


def settings_of(folder: Path, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(folder, image_px=32, num_layers=6))},
            "data": {"max_length": 400},
            "training": {"batch_size": 3, "gradient_accumulation_steps": 1, "lora": {"rank": 4}},
            "validation": {"num_generated": 0},
            "hardware": hardware,
        }
    )


def test_categories_at_the_peak_of_a_trace() -> None:
    trace = MemoryTrace()
    weight = trace.alloc(1000, categories.WEIGHTS_16BIT)
    early = trace.alloc(5000)
    trace.free(early)
    kept = trace.alloc(513)
    trace.alloc_once("cublas", 100)
    trace.label(kept, categories.GRADIENTS)
    highest = trace.alloc(4096, categories.LOSS)
    trace.free(highest)
    trace.free(weight)
    trace.alloc(4000, categories.VISION)
    assert trace.categories_at_peak() == {
        categories.WEIGHTS_16BIT: 1024,
        categories.GRADIENTS: 1024,
        categories.WORKSPACES: 512,
        categories.LOSS: 4096,
    }


@pytest.mark.parametrize("checkpointing", [True, False])
def test_categories_of_a_tiny_model(checkpointing: bool, tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model", gradient_checkpointing=checkpointing)
    spec = resolve(config.model.name)
    work = largest_workload(config, spec)
    trace = Simulator(config, spec, work.processor, BF16, (8, 6)).run(config, work).trace
    found = trace.categories_at_peak()
    num_lora = 6 * 4 * ((64 + 64) * 4 + (64 + 128) * 3)  # rank 4 on the seven linear layers of six decoder layers
    assert found[categories.ADAPTERS] == pytest.approx(4 * num_lora, rel=0.35)  # fp32; small blocks are rounded up
    num_tokens = work.batch.labels.numel()
    hidden_bytes = num_tokens * 64 * 2
    if checkpointing:  # each layer's input is kept, and nothing else of it
        assert found[categories.LAYER_OUTPUTS] % hidden_bytes == 0
        assert found[categories.LAYER_OUTPUTS] // hidden_bytes in range(1, 7)
        assert categories.KEPT_FOR_BACKWARD not in found
    else:
        assert found[categories.KEPT_FOR_BACKWARD] > 6 * hidden_bytes
    assert set(found) <= set(categories.ORDER)


def test_the_breakdown_of_a_plan_adds_up(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model")
    planned = plan(config, resolve(config.model.name), get_gpu("RTX 4060"), reserve_bytes=0)
    assert sum(planned.breakdown.values()) == planned.peak.device_bytes
    assert all(size >= 0 for size in planned.breakdown.values())
    assert list(planned.breakdown) == [*categories.ORDER, categories.OVERHEAD, categories.CONTEXT]  # in every plan
    assert planned.breakdown[categories.KEPT_FOR_BACKWARD] == 0


def test_the_loss_is_the_largest_part_of_a_run_with_long_answers_in_one_chunk(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "model")
    spec = resolve(config.model.name)
    peaks = {}
    for chunk in (16, 1 << 16):
        training = config.training.model_copy(update={"loss_chunk_tokens": chunk})
        variant = config.model_copy(update={"training": training})
        peaks[chunk] = plan(variant, spec, get_gpu("RTX 4060"), reserve_bytes=0).breakdown.get(categories.LOSS, 0)
    assert peaks[1 << 16] > 10 * peaks[16]
