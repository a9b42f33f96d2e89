"""What adapters that are computed together save, as the planner says; and that it counts as it is called."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plan.test_layer_memo import BF16
from tests.plan.test_simulate import growth_of_training, real_trace, simulated_growth
from tests.tiny import build_tiny_llava

from eightgig.config import TrainingConfig
from eightgig.plan.op_costs import PRODUCT
from eightgig.plan.simulate import Simulation, simulate
from eightgig.plan.workload import largest_workload
from eightgig.registry import resolve
from tiny_family import all_tiny_families, build_tiny_family

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=NUM_LAYERS)


def _simulated(folder: Path, *, fused: bool, training: dict[str, Any] | None = None, **hardware: Any) -> Simulation:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"max_length": 400},
            "training": {"batch_size": 3, "gradient_accumulation_steps": 2, **(training or {})},
            "hardware": {"fused_lora": fused, **hardware},
            "validation": {"num_generated": 0},
        }
    )
    spec = resolve(config.model.name)
    return simulate(config, spec, largest_workload(config, spec), BF16, (9, 0))


def _launches(simulation: Simulation) -> tuple[float, float]:
    """Operations and kernels of a micro-batch."""
    costs = simulation.micro_batch_costs
    return sum(costs.values()), sum(cost.num_kernels * count for cost, count in costs.items())


@pytest.mark.parametrize("training", [{}, {"method": "lora"}])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_less_is_launched_and_less_memory_taken(folder: Path, training: dict[str, Any], checkpoints: bool) -> None:
    plain, ours = (
        _simulated(folder, fused=fused, training=training, gradient_checkpointing=checkpoints)
        for fused in (False, True)
    )
    assert max(growth_of_training(ours.trace)) < max(growth_of_training(plain.trace))
    for mine, theirs in zip(_launches(ours), _launches(plain), strict=True):
        assert theirs - mine > NUM_LAYERS * 7 * 6  # at least so many a linear layer, forward and backward


def test_products_are_as_many_as_before_and_none_is_of_fp32(folder: Path) -> None:
    plain, ours = (_simulated(folder, fused=fused, gradient_checkpointing=False) for fused in (False, True))
    flops = []
    for simulation in (plain, ours):
        by_dtype: Counter[torch.dtype] = Counter()
        for cost, count in simulation.micro_batch_costs.items():
            if cost.kind == PRODUCT:
                by_dtype[cost.dtype] += cost.flops * count
        flops.append(by_dtype)
    assert flops[0][torch.float32] > 0
    assert flops[1][torch.float32] == 0
    assert sum(flops[1].values()) == sum(flops[0].values())


def test_with_dropout_nothing_changes(folder: Path) -> None:
    plain, ours = (_simulated(folder, fused=fused, training={"lora": {"dropout": 0.1}}) for fused in (False, True))
    assert ours.trace.sizes_bytes == plain.trace.sizes_bytes
    assert ours.micro_batch_costs == plain.micro_batch_costs


def test_layers_with_biases_take_what_real_ones_take(tmp_path: Path) -> None:
    tiny = next(each for each in all_tiny_families() if each.name == "llava_onevision")
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_family(tiny, tmp_path / "model"))},
            "data": {"max_length": 48},
            "training": {"batch_size": 2, "gradient_accumulation_steps": 1, "optimizer": "adamw_8bit"},
            "hardware": {"fused_lora": True},
        }
    )
    assert simulated_growth(config) == growth_of_training(real_trace(config, resolve(config.model.name)))
