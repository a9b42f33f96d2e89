"""The search beside trying everything, what it keeps, and what it offers where nothing fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import build_tiny_llava

from eightgig.config import TrainingConfig
from eightgig.config.levers import settled
from eightgig.core.errors import ConfigError
from eightgig.core.units import MIB, format_bytes
from eightgig.memory import layer_inputs
from eightgig.plan.candidates import Candidates, with_changes
from eightgig.plan.chosen_levers import TILE_TOKENS, fewest_streamed
from eightgig.plan.fewer_checkpointed import smallest_fit
from eightgig.plan.levers import _settings, levers_of
from eightgig.plan.plan import Plan, plan
from eightgig.plan.search import FEATURES, OFFLOAD, TILES, Request, _cheap_changes, search
from eightgig.plan.workload import Workload, largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.registry.family import base_model
from eightgig.registry.gpus import GpuFacts, get_gpu

CHECKPOINTING, LAYERS, BATCH, ACCUMULATION = (
    "hardware.gradient_checkpointing",
    "hardware.checkpointed_layers",
    "training.batch_size",
    "training.gradient_accumulation_steps",
)
NUM_SAMPLES = 4
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = build_tiny_llava(tmp_path_factory.mktemp("search") / "model", image_px=32, num_layers=NUM_LAYERS)
    return resolve(str(folder))


@pytest.fixture(scope="module")
def config(spec: ModelSpec) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": spec.location},
            "data": {"max_length": 640, "image_size": 32},
            "training": {"gradient_accumulation_steps": NUM_SAMPLES, "lora": {"rank": 8}},
            "validation": {"num_generated": 0},
        }
    )


@pytest.fixture(scope="module")
def pinned(config: TrainingConfig) -> TrainingConfig:
    """The same, with every lever off by the user's own word."""
    return settled(config)


def card_of(budget_bytes: int) -> GpuFacts:
    return replace(get_gpu("RTX 4060"), vram_bytes=budget_bytes)


def searched(config: TrainingConfig, spec: ModelSpec, budget_bytes: int, fixed: tuple[str, ...] = ()) -> Plan:
    def workload_of(variant: TrainingConfig) -> Workload:
        return largest_workload(variant, spec)

    return search(config, spec, card_of(budget_bytes), reserve_bytes=0, fixed=fixed, workload_of=workload_of)


@pytest.fixture(scope="module")
def tried(config: TrainingConfig, spec: ModelSpec) -> list[Plan]:
    """A plan of each variant on a card without end, none left out but most numbers of checkpointed layers."""
    plans = []
    for layers, batch in itertools.product((0, 3, None), (1, 2, 4)):
        checkpointed = {CHECKPOINTING: False} if layers == 0 else {LAYERS: layers}
        changes = {**checkpointed, BATCH: batch, ACCUMULATION: NUM_SAMPLES // batch}
        variant = with_changes(config, changes)
        assert variant is not None
        plans.append(plan(variant, spec, card_of(1 << 40), reserve_bytes=0))
    return plans


def step_s(planned: Plan) -> float:
    assert planned.time is not None
    return planned.time.step_s


def test_nothing_that_fits_is_faster(config: TrainingConfig, spec: ModelSpec, tried: list[Plan]) -> None:
    peaks = sorted({planned.peak.device_bytes for planned in tried})
    assert len(peaks) > 3
    for budget_bytes in (peaks[0], peaks[len(peaks) // 2], peaks[-1]):
        fastest_s = min(step_s(planned) for planned in tried if planned.peak.device_bytes <= budget_bytes)
        found = searched(config, spec, budget_bytes)
        assert found.fits
        assert found.peak.device_bytes <= budget_bytes
        assert step_s(found) <= fastest_s * (1 + 1e-6)


def test_it_keeps_what_the_user_fixed(config: TrainingConfig, spec: ModelSpec) -> None:
    found = searched(config, spec, 1 << 40, fixed=(CHECKPOINTING, BATCH))
    assert found.config["hardware"]["gradient_checkpointing"] is True
    assert found.config["training"]["batch_size"] == 1
    assert searched(config, spec, 1 << 40, fixed=(CHECKPOINTING,)).config["training"]["batch_size"] == NUM_SAMPLES


def test_a_preset_that_was_not_asked_for_need_not_be_kept(config: TrainingConfig, spec: ModelSpec) -> None:
    bound = with_changes(config, {"preset": "ultra_low_memory"})
    assert bound is not None
    assert with_changes(bound, {CHECKPOINTING: False}) is None
    assert searched(bound, spec, 1 << 40).config["hardware"]["gradient_checkpointing"] is False
    kept = searched(bound, spec, 1 << 40, fixed=("preset",))
    assert kept.config["hardware"]["gradient_checkpointing"] is True
    assert kept.config["preset"] == "ultra_low_memory"


def test_where_nothing_fits_it_offers_what_would(pinned: TrainingConfig, spec: ModelSpec, tried: list[Plan]) -> None:
    smallest = min(planned.peak.device_bytes for planned in tried)
    budget_bytes = smallest - 2 * MIB
    found = searched(pinned, spec, budget_bytes)
    assert found.fits is False
    assert found.alternatives
    for alternative in found.alternatives:
        variant = with_changes(pinned, alternative.settings)
        assert variant is not None
        assert plan(variant, spec, card_of(budget_bytes), reserve_bytes=0).fits
        assert alternative.device_bytes <= budget_bytes
    longest = found.alternatives[-1].settings.get("data.max_length")
    if longest is not None:  # the next longer one that was in question does not fit
        longer = with_changes(pinned, {**found.alternatives[-1].settings, "data.max_length": longest + 64})
        assert longer is not None
        assert not plan(longer, spec, card_of(budget_bytes), reserve_bytes=0).fits
    assert searched(pinned, spec, 300 * MIB).alternatives == ()  # less than the CUDA context


def test_what_it_offers_instead_of_a_fixed_batch_keeps_the_samples_of_a_step(
    pinned: TrainingConfig, spec: ModelSpec
) -> None:
    wide = with_changes(pinned, {BATCH: 4, ACCUMULATION: 2})
    narrow = with_changes(pinned, {BATCH: 1, ACCUMULATION: 8})
    assert wide is not None
    assert narrow is not None
    needed_bytes = plan(narrow, spec, card_of(1 << 40), reserve_bytes=0).peak.device_bytes
    found = searched(wide, spec, needed_bytes, fixed=(BATCH, CHECKPOINTING))
    assert found.fits is False
    assert [dict(alternative.settings) for alternative in found.alternatives] == [{BATCH: 1, ACCUMULATION: 8}]
    assert found.alternatives[0].device_bytes == needed_bytes


def test_what_it_offers_fits_in_validation_too(pinned: TrainingConfig, spec: ModelSpec) -> None:
    answering = pinned.model_copy(update={"validation": pinned.validation.model_copy(update={"num_generated": 4})})
    wide = with_changes(answering, {BATCH: 4, ACCUMULATION: 1})
    assert wide is not None
    peak_bytes = plan(wide, spec, card_of(1 << 40), reserve_bytes=0).peak.device_bytes
    found = searched(wide, spec, peak_bytes - MIB, fixed=(BATCH, CHECKPOINTING))
    for alternative in found.alternatives:
        variant = with_changes(wide, alternative.settings)
        assert variant is not None
        assert plan(variant, spec, card_of(peak_bytes - MIB), reserve_bytes=0).fits
    assert found.alternatives


def test_levers_are_the_difference_to_the_run_without_them(config: TrainingConfig, spec: ModelSpec) -> None:
    def workload_of(variant: TrainingConfig) -> Workload:
        return largest_workload(variant, spec)

    gpu = get_gpu("RTX 4060")
    candidates = Candidates(config, spec, gpu, gpu.vram_bytes, workload_of, None)
    levers = {lever.name: lever for lever in levers_of(candidates, {})}
    peaks: dict[bool, int] = {}
    for checkpointing in (True, False):
        variant = with_changes(config, {CHECKPOINTING: checkpointing})
        assert variant is not None
        peaks[checkpointing] = plan(variant, spec, gpu, reserve_bytes=0).peak.device_bytes
    assert levers["gradient checkpointing"].saves_bytes == peaks[False] - peaks[True]
    num_4bit = 6 * (4 * 64 * 64 + 3 * 64 * 128)  # linear layers of the six decoder layers
    simulation = candidates.get({})
    assert simulation is not None
    assert simulation.simulation.num_4bit_parameters == num_4bit
    packed = num_4bit // 2  # two weights a byte; scales come on top
    assert 2 * num_4bit - 1.1 * packed < levers["4-bit weights"].saves_bytes <= 2 * num_4bit - packed
    assert all(lever.saves_bytes > 0 and lever.reason for lever in levers.values())


def test_weights_in_ram_are_levers(config: TrainingConfig, spec: ModelSpec) -> None:
    settings = {"hardware.streamed_layers": 4, "hardware.embedding_on_host": True}
    gpu = get_gpu("RTX 4060")
    candidates = Candidates(config, spec, gpu, gpu.vram_bytes, lambda variant: largest_workload(variant, spec), None)
    found = candidates.get(settings)
    assert found is not None
    without = {path: off for _, changes, _ in _settings(found, NUM_LAYERS) for path, off in changes.items()}
    for path, value in (("hardware.streamed_layers", 0), ("hardware.embedding_on_host", False)):
        assert without[path] == value
        other = candidates.get({**settings, path: value})
        assert other is not None
        assert other.result.peak_allocated_bytes > found.result.peak_allocated_bytes


def test_changes_that_contradict_settings_are_none(config: TrainingConfig) -> None:
    changes: Mapping[str, Any] = {"training.batch_size": 0}
    assert with_changes(config, changes) is None
    changed = with_changes(config, {"data.max_length": 96})
    assert changed is not None
    assert changed.data.max_length == 96
    assert config.data.max_length == 640


def test_it_checkpoints_as_few_layers_as_fit_and_says_how_many(config: TrainingConfig, spec: ModelSpec) -> None:
    fixed = (CHECKPOINTING, BATCH)
    peaks = {}
    for layers in range(1, NUM_LAYERS + 1):
        variant = with_changes(config, {LAYERS: layers})
        assert variant is not None
        peaks[layers] = plan(variant, spec, card_of(1 << 40), reserve_bytes=0).peak.device_bytes
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    assert peaks[NUM_LAYERS - 1] == peaks[NUM_LAYERS]  # the last layer lies where another would be computed again
    for layers in (2, NUM_LAYERS - 1):
        found = searched(config, spec, peaks[layers], fixed=fixed)
        assert found.fits
        assert found.config["hardware"]["checkpointed_layers"] == min(n for n in peaks if peaks[n] <= peaks[layers])
        lever = next(lever for lever in found.levers if lever.name == "gradient checkpointing")
        assert lever.reason.startswith(f"{found.config['hardware']['checkpointed_layers']} of 6 layers are computed")


def test_it_keeps_the_number_of_checkpointed_layers_that_the_user_gave(config: TrainingConfig, spec: ModelSpec) -> None:
    given = with_changes(config, {LAYERS: 4})
    assert given is not None
    found = searched(given, spec, 1 << 40)
    assert found.config["hardware"]["checkpointed_layers"] == 4
    assert found.config["training"]["batch_size"] == NUM_SAMPLES
    every = with_changes(config, {LAYERS: None})
    assert every is not None
    all_of_them = searched(every, spec, 1 << 40, fixed=(CHECKPOINTING,))
    assert all_of_them.config["hardware"]["checkpointed_layers"] is None


@given(st.integers(2, 100), st.data())
def test_the_smallest_fit_is_found_in_few_questions(last: int, data: st.DataObject) -> None:
    smallest, guess = data.draw(st.integers(1, last)), data.draw(st.integers(-5, last + 5))
    asked = []

    def fits(number: int) -> bool:
        assert 1 <= number < last
        asked.append(number)
        return number >= smallest

    assert smallest_fit(last, guess, fits) == smallest
    assert len(asked) == len(set(asked)) <= 2 + math.ceil(math.log2(last))
    if guess in (smallest, smallest - 1):
        assert len(asked) <= 2


def request_for(config: TrainingConfig, spec: ModelSpec) -> Request:
    return Request(config, spec, card_of(1 << 30), 0, (), lambda variant: largest_workload(variant, spec), None)


def test_long_rows_are_offered_tiles_then_the_host_before_shorter_texts(
    spec: ModelSpec, pinned: TrainingConfig
) -> None:
    def offered(**changes: Any) -> list[str]:
        variant = with_changes(pinned, {"training.loss_chunk_tokens": 64, **changes})
        assert variant is not None
        return [path for change, _ in _cheap_changes(request_for(variant, spec)) for path in change]

    to_ram = ["training.optimizer", "hardware.embedding_on_host", FEATURES]
    assert offered(**{"data.max_length": 2 * TILE_TOKENS}) == [TILES, OFFLOAD, *to_ram]
    assert offered(**{"data.max_length": 2 * TILE_TOKENS, TILES: 4 * TILE_TOKENS}) == [TILES, OFFLOAD, *to_ram]
    assert offered(**{"data.max_length": 2 * TILE_TOKENS, TILES: 100, OFFLOAD: True}) == to_ram
    assert offered(**{"data.max_length": TILE_TOKENS // 2, LAYERS: 2}) == [LAYERS, OFFLOAD, *to_ram]


def test_the_lever_of_layer_inputs_says_what_is_pinned(
    spec: ModelSpec, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    offloading = with_changes(config, {OFFLOAD: True})
    assert offloading is not None
    candidates = Candidates(offloading, spec, card_of(1 << 30), 1 << 30, lambda c: largest_workload(c, spec), None)
    found = candidates.get({})
    assert found is not None
    pinned_bytes = (NUM_LAYERS - 1) * found.work.batch.model_inputs["input_ids"].numel() * 64 * 2  # bf16
    notes = {name: note for name, _, note in _settings(found, NUM_LAYERS)}
    assert notes["layer inputs on the host"] == f"{format_bytes(pinned_bytes)} of the host's memory are pinned; "


def test_where_nothing_else_fits_it_streams_as_few_layers_as_will_do(config: TrainingConfig, spec: ModelSpec) -> None:
    """Beside a plan of each number of layers, on top of all changes that cost less."""
    cheaper = {CHECKPOINTING: True, "training.optimizer": "paged_adamw_8bit", "training.loss_chunk_tokens": 256}
    cheaper |= {OFFLOAD: True, "hardware.embedding_on_host": True}
    allocated: dict[int, int] = {}
    for count in (0, 3, 4, 5, 6):
        variant = with_changes(config, {**cheaper, "hardware.streamed_layers": count})
        assert variant is not None
        allocated[count] = plan(variant, spec, card_of(1 << 40), reserve_bytes=0).peak.allocated_bytes
    assert sorted(allocated.values(), reverse=True) == list(allocated.values())

    class Sized(Candidates):
        """Fits by what is allocated: segments of 2 MiB are coarser than a tiny layer."""

        limit_bytes = 0

        def get(self, changes: Mapping[str, Any]) -> Any:
            found = super().get(changes)
            if found is None:
                return None
            return replace(found, fits=found.result.peak_allocated_bytes <= self.limit_bytes)

    candidates = Sized(config, spec, card_of(1 << 40), 1 << 40, lambda variant: largest_workload(variant, spec), None)
    for limit_bytes, expected in (
        (allocated[5], 5),
        (allocated[4] - 1, 5),
        (allocated[3], 3),
        (allocated[6] - 1, None),
    ):
        candidates.limit_bytes = limit_bytes
        assert fewest_streamed(candidates, cheaper) == expected


def test_a_model_that_can_not_keep_its_embedding_in_ram_is_not_offered_it(
    pinned: TrainingConfig, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heads(family: Any, model: Any) -> list[Any]:
        return [base_model(model).lm_head]

    monkeypatch.setattr(type(spec.family), "host_tables", heads)
    found = searched(pinned, spec, 900 * MIB)
    assert all("hardware.embedding_on_host" not in each.settings for each in found.alternatives)
    variant = with_changes(pinned, {"hardware.embedding_on_host": True})
    assert variant is not None
    with pytest.raises(ConfigError, match="its head computes with the same table"):
        plan(variant, spec, None, reserve_bytes=0)
