"""The plan of a run whose vision tower is in 4 bits: its weights, and when it is offered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.units import MIB
from eightgig.memory.cached_tower import tower_features
from eightgig.models.precision import Precision
from eightgig.models.tower_in_4bit import _computing_with, tower_weights_kept
from eightgig.plan.candidates import Candidates, with_changes
from eightgig.plan.categories import WEIGHTS_4BIT, WEIGHTS_16BIT
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.levers import levers_of
from eightgig.plan.plan import Plan, plan
from eightgig.plan.recorder import Recorder
from eightgig.plan.search import search
from eightgig.plan.simulate import simulate
from eightgig.plan.trace import FREED, MemoryTrace
from eightgig.plan.workload import Workload, largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.registry.gpus import GpuFacts, get_gpu
from tiny_families import llava, qwen2_vl, qwen_vl
from tiny_family import TinyFamily
from tiny_training import load_tiny, tiny_config, tiny_inputs

TOWER = "training.quantization.vision_tower"
STREAMED = "hardware.streamed_layers"
FIXED = ("hardware.gradient_checkpointing", "hardware.checkpointed_layers", "training.batch_size")
BF16 = Precision(compute_dtype=torch.bfloat16, mixed_precision=MixedPrecision.BF16, note=None)
HIDDEN, INNER, NUM_LAYERS = 1024, 2048, 2
NUM_TOWER_PARAMETERS = NUM_LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INNER)  # of its linear layers: 32 MiB in bf16
PARAMETERS_A_BLOCK, SCALES_A_BLOCK = 64, 256
BLOCK_BYTES = 512  # what CUDA's allocator rounds up to


def nf4_bytes(num_parameters: int) -> int:
    """Two values a byte, a byte a block, an fp32 number for each 256 of those: here all come out even."""
    num_blocks = num_parameters // PARAMETERS_A_BLOCK
    return num_parameters // 2 + num_blocks + 4 * num_blocks // SCALES_A_BLOCK


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """LLaVA with a tower of 32 MiB in 16 bits."""
    tower = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": NUM_LAYERS}
    vision = {**llava.FACTS.architecture["vision_config"], **tower, "num_attention_heads": 4}
    text = {**llava.FACTS.architecture["text_config"], "num_hidden_layers": 4}
    facts = replace(
        llava.FACTS,
        architecture={**llava.FACTS.architecture, "vision_config": vision, "text_config": text},
        num_language_linears=4 * 7,
    )
    return ModelSpec(llava.TINY[0].family, facts)


@pytest.fixture(scope="module")
def config() -> TrainingConfig:
    values = {"data": {"max_length": 128}, "training": {"lora": {"rank": 4}, "gradient_accumulation_steps": 1}}
    return TrainingConfig.model_validate({**values, "validation": {"num_generated": 0}})


def changed(config: TrainingConfig, changes: Mapping[str, Any]) -> TrainingConfig:
    variant = with_changes(config, changes)
    assert variant is not None
    return variant


def card_of(budget_bytes: int) -> GpuFacts:
    return replace(get_gpu("RTX 4060"), vram_bytes=budget_bytes)


def searched(config: TrainingConfig, spec: ModelSpec, budget_bytes: int) -> Plan:
    def workload_of(variant: TrainingConfig) -> Workload:
        return largest_workload(variant, spec)

    return search(config, spec, card_of(budget_bytes), reserve_bytes=0, fixed=FIXED, workload_of=workload_of)


def test_its_weights_are_4bit_ones_in_the_breakdown(config: TrainingConfig, spec: ModelSpec) -> None:
    plain, tower = (plan(changed(config, {TOWER: on}), spec, None, reserve_bytes=0) for on in (False, True))
    grown = tower.breakdown[WEIGHTS_4BIT] - plain.breakdown[WEIGHTS_4BIT]
    num_weights = NUM_LAYERS * 6
    rounded = grown - nf4_bytes(NUM_TOWER_PARAMETERS)
    assert 0 <= rounded < num_weights * 3 * BLOCK_BYTES  # packed weight, scales, scales of scales
    assert plain.breakdown[WEIGHTS_16BIT] - tower.breakdown[WEIGHTS_16BIT] == 2 * NUM_TOWER_PARAMETERS
    assert tower.peak.reserved_bytes < plain.peak.reserved_bytes


@pytest.mark.parametrize(
    ("tiny", "num_expected"),
    [
        (llava.TINY[0], 2 * (4 * 64 * 64 + 2 * 64 * 128)),
        (qwen2_vl.TINY[0], 2 * (4 * 64 * 64 + 2 * 64 * 128)),
        (qwen_vl.TINY[0], 0),
    ],
    ids=["llava", "qwen2_vl", "qwen_vl"],
)
def test_layers_of_a_tower_that_are_not_its_projector_s_come_to_4_bits(
    tiny: TinyFamily, num_expected: int, config: TrainingConfig
) -> None:
    """By hand from the tiny architectures; the tower of Qwen-VL is in 4 bits in any case."""
    spec = ModelSpec(tiny.family, tiny.facts)
    counts = []
    for on in (False, True):
        variant = changed(config, {TOWER: on})
        counts.append(simulate(variant, spec, largest_workload(variant, spec), BF16, (8, 6)).num_4bit_parameters)
    assert counts[1] - counts[0] == num_expected


def test_it_is_the_last_thing_offered_before_shorter_texts(config: TrainingConfig, spec: ModelSpec) -> None:
    least = {"training.optimizer": "paged_adamw_8bit", "hardware.offload_layer_inputs": True, STREAMED: 4}
    least |= {"hardware.embedding_on_host": True, "training.loss_chunk_tokens": 256}
    needs = {
        on: plan(changed(config, {**least, TOWER: on}), spec, card_of(1 << 40), reserve_bytes=0).peak.device_bytes
        for on in (False, True)
    }
    assert needs[False] - needs[True] > 8 * MIB
    assert all(TOWER not in each.settings for each in searched(config, spec, needs[False]).alternatives)
    found = searched(config, spec, needs[True])
    assert found.fits is False
    (offered,) = found.alternatives
    assert offered.settings[TOWER] is True
    assert offered.price == "the vision tower's features change a little; the run's receipt says how much"
    planned = plan(changed(config, offered.settings), spec, card_of(needs[True]), reserve_bytes=0)
    assert planned.fits
    assert offered.device_bytes == planned.peak.device_bytes


def test_the_lever_is_told_by_the_run_without_it(config: TrainingConfig, spec: ModelSpec) -> None:
    gpu = get_gpu("RTX 4060")
    candidates = Candidates(
        changed(config, {TOWER: True}), spec, gpu, gpu.vram_bytes, lambda variant: largest_workload(variant, spec), None
    )
    with_it, without = candidates.get({}), candidates.get({TOWER: False})
    assert with_it is not None
    assert without is not None
    (lever,) = [lever for lever in levers_of(candidates, {}) if lever.name == "vision tower in 4 bits"]
    assert lever.saves_bytes == without.device_bytes - with_it.device_bytes > 8 * MIB


def test_comparing_the_towers_takes_no_more_than_the_tower_in_4_bits_does(tmp_path: Path) -> None:
    """Beside the card's own unpacking of a 4-bit weight, and with 16-bit weights that must be copied to compute."""
    settings = tiny_config({"training": {"quantization": {"vision_tower": True}}})
    folder = build_tiny_llava(tmp_path)
    with tower_weights_kept(settings, resolve(str(folder))) as originals:
        loaded = load_tiny(folder, settings)
    in_fp16 = {layer: weight.half() for layer, weight in originals.items()}
    inputs = {name: value for name, value in tiny_inputs(loaded).items()}

    def highest_bytes(run: Callable[[], object]) -> int:
        recorder = Recorder(MemoryTrace(), CudaRules((8, 6)))
        with recorder:
            recorder._note([*loaded.model.parameters(), *loaded.model.buffers(), *inputs.values()])
            run()
        live = highest = 0
        sizes: dict[int, int] = {}
        for block, size in recorder.ledger:
            live += -sizes.pop(block) if size == FREED else size
            sizes |= {} if size == FREED else {block: size}
            highest = max(highest, live)
        return highest

    in_4bit = highest_bytes(lambda: tower_features(loaded.model, loaded.spec.family, inputs))

    def in_16bit() -> None:
        with _computing_with(in_fp16):
            tower_features(loaded.model, loaded.spec.family, inputs)

    assert highest_bytes(in_16bit) <= in_4bit
