"""The table of cards and models, against simulations of which every byte is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import build_tiny_llava

from eightgig.app.gpu_matrix import (
    COMMON_TOKENS,
    LADDER_TOKENS,
    REFERENCE_GPU,
    Matrix,
    ReplayedRun,
    card_class,
    lengths_of,
    longest_fit,
    matrix,
)
from eightgig.app.planning import plan_run
from eightgig.config import ConfigPresets, TrainingConfig
from eightgig.core.errors import UnsupportedModel
from eightgig.core.units import GIB, MIB
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.cuda_rules import CudaRules
from eightgig.registry import ModelSpec, get, resolve
from eightgig.registry.gpus import GpuFacts, all_gpus, get_gpu

QWEN = get("qwen2-vl-2b")  # its positions hold every length of the ladder


@dataclass(frozen=True)
class KnownRun:
    """A run that takes so many bytes."""

    device_bytes: int

    def fits(self, budget_bytes: int) -> bool:
        return self.device_bytes <= budget_bytes


@dataclass
class Simulations:
    """Stands in for the simulator: bytes by length, and what was asked for."""

    bytes_at: Mapping[int, int]
    asked: list[tuple[int, tuple[bool, bool]]] = field(default_factory=list)

    def __call__(self, config: TrainingConfig, spec: ModelSpec, gpu: GpuFacts) -> KnownRun:
        assert config.preset == "ultra_low_memory"
        self.asked.append((config.data.max_length, card_class(gpu)))
        return KnownRun(self.bytes_at[config.data.max_length])


def no_speeds(config: TrainingConfig, spec: ModelSpec, gpus: Sequence[GpuFacts]) -> Mapping[str, float]:
    """Tells no speed, as of cards without known rates."""
    return {}


def card(name: str, vram_bytes: int, like: str = "RTX 4060") -> GpuFacts:
    """A card of `like`'s kind with so much memory."""
    return replace(get_gpu(like), name=name, vram_bytes=vram_bytes)


def longest(found: Matrix) -> dict[str, int | None]:
    """Longest length by card."""
    return {cell.gpu: cell.max_length_tokens for cell in found.cells}


def test_a_budget_fits_to_the_byte() -> None:
    bytes_at = {length: length * MIB for length in LADDER_TOKENS}
    reserve_bytes = round(0.4 * GIB)
    cards = [
        card(f"{length} {off:+d}", bytes_at[length] + reserve_bytes + off)
        for length in LADDER_TOKENS
        for off in (-1, 0, 1)
    ]
    found = longest(matrix([QWEN], cards, simulate_on=Simulations(bytes_at), speed=no_speeds))
    shorter = dict(zip(LADDER_TOKENS, [None, *LADDER_TOKENS], strict=False))
    for length in LADDER_TOKENS:
        assert [found[f"{length} {off:+d}"] for off in (-1, 0, 1)] == [shorter[length], length, length]


@given(
    sizes=st.lists(st.integers(1, 100), min_size=len(LADDER_TOKENS), max_size=len(LADDER_TOKENS)).map(sorted),
    budgets=st.lists(st.integers(0, 110), min_size=1, max_size=6),
)
def test_the_longest_length_is_what_trying_all_finds(sizes: list[int], budgets: list[int]) -> None:
    bytes_at = dict(zip(LADDER_TOKENS, sizes, strict=True))
    cards = [card(f"card {index}", budget) for index, budget in enumerate(budgets)]
    simulations = Simulations(bytes_at)
    found = matrix([QWEN], cards, reserve_gib=0, simulate_on=simulations, speed=no_speeds)
    for cell, budget in zip(found.cells, budgets, strict=True):
        fitting = [length for length in LADDER_TOKENS if bytes_at[length] <= budget]
        assert cell.max_length_tokens == (fitting[-1] if fitting else None)
        assert cell.device_bytes == bytes_at[fitting[-1] if fitting else LADDER_TOKENS[0]]
    assert len(simulations.asked) == len(set(simulations.asked)), "one simulation serves all cards"
    order = sorted(zip(budgets, (cell.max_length_tokens or 0 for cell in found.cells), strict=True))
    lengths = [length for _, length in order]
    assert lengths == sorted(lengths), "more memory never takes less"


@given(st.integers(0, 12), st.integers(0, 12))
def test_bisection_asks_no_more_than_it_must(num_lengths: int, num_fitting: int) -> None:
    num_fitting = min(num_fitting, num_lengths)
    asked: list[int] = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length < num_fitting

    assert longest_fit(range(num_lengths), fits) == (num_fitting - 1 if num_fitting else None)
    assert len(asked) <= math.ceil(math.log2(num_lengths + 1))


def test_cards_of_one_class_take_the_same_and_share_their_simulations() -> None:
    state_of = {gpu.name: (vars(CudaRules(gpu.compute_capability or (0, 0))), gpu.has_bf16) for gpu in all_gpus()}
    for one in all_gpus():
        for other in all_gpus():
            assert (card_class(one) == card_class(other)) == (state_of[one.name] == state_of[other.name])
    simulations = Simulations(dict.fromkeys(LADDER_TOKENS, GIB))
    matrix([QWEN], simulate_on=simulations, speed=no_speeds)
    assert len(simulations.asked) <= len({card_class(gpu) for gpu in all_gpus()}) * len(LADDER_TOKENS)


def test_no_length_is_tried_that_a_models_positions_do_not_hold() -> None:
    assert lengths_of(QWEN) == LADDER_TOKENS
    assert lengths_of(get("llava-1.5-7b")) == (256, 512, 1024, 2048)  # 4,096 positions, 576 of them the image's
    assert lengths_of(get("eightgig-demo")) == (256, 512)  # 1,024 positions, 441 of them the image's
    simulations = Simulations(dict.fromkeys(LADDER_TOKENS, 1))
    found = matrix([get("llava-1.5-7b")], [get_gpu("H200")], simulate_on=simulations, speed=no_speeds)
    assert longest(found) == {"H200": 2048}
    assert found.models[0].longest_tokens == 2048


def test_a_model_that_cant_be_planned_is_left_out_with_the_reason() -> None:
    def refuse(config: TrainingConfig, spec: ModelSpec, gpu: GpuFacts) -> KnownRun:
        if spec is QWEN:
            raise UnsupportedModel("no processor\n  for it", expected="a", next_step="b")
        return KnownRun(1)

    said: list[str] = []
    found = matrix(
        [QWEN, get("qwen2-vl-7b")], [get_gpu("T4")], simulate_on=refuse, speed=no_speeds, on_progress=said.append
    )
    assert [(row.model, row.reason) for row in found.left_out] == [("qwen2-vl-2b", "no processor")]
    assert [model.name for model in found.models] == ["qwen2-vl-7b"]
    assert {cell.model for cell in found.cells} == {"qwen2-vl-7b"}
    assert "qwen2-vl-2b is left out: no processor" in said


def test_progress_is_told_a_simulation_at_a_time() -> None:
    said: list[str] = []
    simulations = Simulations(dict.fromkeys(LADDER_TOKENS, 3 * GIB))
    matrix([QWEN], [get_gpu("T4"), get_gpu("H200")], simulate_on=simulations, speed=no_speeds, on_progress=said.append)
    assert len(said) == len(simulations.asked)
    assert "qwen2-vl-2b, 8,192 tokens, cards before Hopper, fp16: 3.00 GiB" in said
    assert "qwen2-vl-2b, 8,192 tokens, cards Hopper and later, bf16: 3.00 GiB" in said


@pytest.mark.parametrize("with_reference", [True, False])
def test_speeds_are_of_cards_that_fit_and_in_multiples_of_the_reference(with_reference: bool) -> None:
    known = {"RTX 4060": 100.0, "RTX 3090": 250.0, REFERENCE_GPU: 1000.0, "small": 50.0}

    def speed(config: TrainingConfig, spec: ModelSpec, gpus: Sequence[GpuFacts]) -> Mapping[str, float]:
        assert config.data.max_length == COMMON_TOKENS
        return {gpu.name: known[gpu.name] for gpu in gpus if gpu.name in known}

    bytes_at = {length: 1 if length == LADDER_TOKENS[0] else 4 * GIB for length in LADDER_TOKENS}
    cards = [get_gpu("RTX 4060"), get_gpu("RTX 3090"), card("small", 2 * GIB), get_gpu("RTX 3070")]
    cards += [get_gpu(REFERENCE_GPU)] if with_reference else []
    found = matrix([QWEN], cards, simulate_on=Simulations(bytes_at), speed=speed)
    speeds = {cell.gpu: (cell.tokens_per_s, cell.relative_speed) for cell in found.cells}
    assert speeds.pop(REFERENCE_GPU, (1000.0, 1.0)) == (1000.0, 1.0)
    assert speeds == {
        "RTX 4060": (100.0, 0.1),
        "RTX 3090": (250.0, 0.25),
        "small": (None, None),  # 256 tokens fit it, the length at which speeds are compared does not
        "RTX 3070": (None, None),  # its speed is not known
    }


def test_a_run_fits_what_it_takes_and_not_a_byte_less() -> None:
    run = ReplayedRun(CONTEXT_BYTES + 100 * MIB)
    assert run.fits(CONTEXT_BYTES + 100 * MIB)
    assert not run.fits(CONTEXT_BYTES + 100 * MIB - 1)


def test_the_table_says_what_the_plan_says(tmp_path: Path) -> None:
    folder = build_tiny_llava(tmp_path / "model", image_px=336, patch_px=84)
    spec = resolve(str(folder))
    named = ModelSpec(spec.family, replace(spec.facts, name=str(folder)))
    config = ConfigPresets.ultra_low_memory(overrides={"model.name": str(folder), "data.max_length": 256})
    planned = plan_run(config, gpu="T4")
    needed_bytes = planned.peak.device_bytes
    cards = [
        replace(get_gpu("T4"), name=name, vram_bytes=size) for name, size in (("T4", 10 * GIB), ("bare", GIB // 2))
    ]
    found = matrix([named], cards, reserve_gib=0)
    assert longest(found) == {"T4": 512, "bare": None}  # 1,024 positions
    assert found.cells[1].device_bytes == needed_bytes
    data: dict[str, Any] = found.to_json()
    assert data["gpus"][0] == {"name": "T4", "vram_gb": 16, "vram_bytes": 10 * GIB, "budget_bytes": 10 * GIB}
    assert data["method"] == "qlora"
