"""The plan of a run with kept image features: its tower, its phases, and that other runs on the model are as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.models.precision import Precision
from eightgig.plan.candidates import Candidates
from eightgig.plan.levers import levers_of
from eightgig.plan.plan import plan
from eightgig.plan.simulate import Simulation, Simulator
from eightgig.plan.trace import FREED, MemoryTrace
from eightgig.plan.workload import Workload, largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.registry.gpus import get_gpu
from tiny_families import llava, qwen2_vl, qwen3_vl, qwen_vl, smolvlm
from tiny_family import TinyFamily, build_tiny_family

CARD = (8, 6)
BF16 = Precision(compute_dtype=torch.bfloat16, mixed_precision=MixedPrecision.BF16, note=None)


def config_of(folder: Path, *, cached: bool) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"max_length": 128},
            "training": {"batch_size": 2, "lora": {"rank": 4}},
            "hardware": {"cache_image_features": cached},
        }
    )


def live_at_marks(trace: MemoryTrace) -> dict[str, list[tuple[int, int]]]:
    """For each phase of a name: bytes live at its beginning, and the most within it."""
    marks, sizes, live = dict(trace.marks), {}, 0
    phases: list[tuple[str, int, int]] = []
    for index, (block, size) in enumerate(trace):
        if index in marks:
            phases.append((marks[index], live, live))
        live += -sizes.pop(block) if size == FREED else size
        if size != FREED:
            sizes[block] = size
        name, start, most = phases[-1]
        phases[-1] = (name, start, max(most, live))
    found: dict[str, list[tuple[int, int]]] = {}
    for name, start, most in phases:
        found.setdefault(name, []).append((start, most))
    return found


def events(simulation: Simulation) -> list[tuple[int, int]]:
    return list(simulation.trace)


@pytest.fixture(
    params=[llava.TINY[0], qwen2_vl.TINY[-1], qwen3_vl.TINY[0], qwen_vl.TINY[0]], ids=lambda tiny: tiny.name
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny: TinyFamily = request.param
    return build_tiny_family(tiny, tmp_path / "model")


def test_training_starts_without_the_tower_and_other_runs_are_as_before(folder: Path) -> None:
    pixels, fed = (config_of(folder, cached=cached) for cached in (False, True))
    spec = resolve(str(folder))
    work = largest_workload(pixels, spec)
    simulator = Simulator(pixels, spec, work.processor, BF16, CARD)
    before = simulator.run(pixels, work)
    cached = simulator.run(fed, work)
    again, cached_again = simulator.run(pixels, work), simulator.run(fed, work)
    assert events(again) == events(before)
    assert events(cached_again) == events(cached)

    tower = simulator._model.get_base_model().get_submodule(spec.family.modules.towers[0])
    tower_bytes = sum(
        parameter.numel() * parameter.element_size()
        for parameter in tower.parameters()
        if parameter.dtype != torch.uint8
    )
    with_pixels, with_features = live_at_marks(before.trace), live_at_marks(cached.trace)
    assert list(with_features) == ["load", "features", "validate", "train", "save"]
    saved_at_start = with_pixels["train"][0][0] - with_features["train"][0][0]
    assert saved_at_start >= tower_bytes > 0
    # What training takes on top is less too: no activations of the tower, and fewer bytes than pixels at most.
    assert with_features["train"][1][1] <= with_pixels["train"][1][1] - tower_bytes
    # While features are computed the whole model is there, and what the tower takes at work; before that it is not.
    (start, most), (loaded, _) = with_features["features"][0], with_pixels["validate"][0]
    assert start <= loaded - tower_bytes
    assert most > loaded
    assert with_features["load"][0][1] <= with_pixels["load"][0][1] - tower_bytes / 2
    assert sum(cached.micro_batch_costs.values()) < sum(before.micro_batch_costs.values())


def test_a_plan_says_less_and_names_the_phase(tmp_path: Path) -> None:
    folder = build_tiny_llava(tmp_path)
    spec, gpu = resolve(str(folder)), get_gpu("RTX 4060")
    pixels, fed = (plan(config_of(folder, cached=cached), spec, gpu, reserve_bytes=0) for cached in (False, True))
    assert fed.peak.allocated_bytes < pixels.peak.allocated_bytes
    assert "features" in fed.phases
    assert "features" not in pixels.phases


def test_a_tower_with_interpolated_positions_is_planned_too(tmp_path: Path) -> None:
    """Their table is made after loading, and stands in no record of it."""
    folder = build_tiny_llava(tmp_path)
    config = config_of(folder, cached=True)
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": 48})})
    made = plan(config, resolve(str(folder)), get_gpu("RTX 4060"), reserve_bytes=0)
    assert "features" in made.phases


def test_the_lever_is_told_by_the_run_without_it() -> None:
    """With a tower of 32 MiB, and training that takes more than that beside the weights."""
    tower = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**llava.FACTS.architecture["vision_config"], **tower}
    facts = replace(llava.FACTS, architecture={**llava.FACTS.architecture, "vision_config": vision})
    spec, gpu = ModelSpec(llava.TINY[0].family, facts), get_gpu("RTX 4060")
    config = TrainingConfig.model_validate(
        {
            "data": {"max_length": 4096},
            "training": {"batch_size": 8, "lora": {"rank": 4}},
            "hardware": {"cache_image_features": True},
        }
    )

    def workload_of(config: TrainingConfig) -> Workload:
        return largest_workload(config, spec)

    candidates = Candidates(config, spec, gpu, gpu.vram_bytes, workload_of, None)
    with_it, without = candidates.get({}), candidates.get({"hardware.cache_image_features": False})
    assert with_it is not None
    assert without is not None
    (lever,) = [lever for lever in levers_of(candidates, {}) if lever.name == "image features kept"]
    assert lever.saves_bytes == without.device_bytes - with_it.device_bytes
    tower_bytes = 2 * (4 * 1024**2 + 2 * 1024 * 2048) * 2  # its linear layers' weights, in bf16
    less_allocated = without.result.peak_allocated_bytes - with_it.result.peak_allocated_bytes
    assert less_allocated >= tower_bytes
    assert lever.saves_bytes >= tower_bytes / 2  # reserved: holes that the tower leaves are not filled to the last byte


def test_a_family_that_can_t_be_fed_is_refused_by_the_plan_too(tmp_path: Path) -> None:
    folder = build_tiny_family(smolvlm.TINY[0], tmp_path)
    config = config_of(folder, cached=True)
    spec = resolve(str(folder))
    with pytest.raises(ConfigError, match="features can't be given to the"):
        plan(config, spec, None, reserve_bytes=0)
