"""The search beside trying everything, what it keeps, and what it offers where nothing fits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.tiny import build_tiny_llava

from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.core.units import MIB
from eightgig.plan.candidates import Candidates, with_changes
from eightgig.plan.levers import _settings, levers_of
from eightgig.plan.plan import Plan, plan
from eightgig.plan.search import _fewest_streamed, search
from eightgig.plan.workload import Workload, largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.registry.family import base_model
from eightgig.registry.gpus import GpuFacts, get_gpu

CHECKPOINTING, BATCH, ACCUMULATION = (
    "hardware.gradient_checkpointing",
    "training.batch_size",
    "training.gradient_accumulation_steps",
)
NUM_SAMPLES = 4


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = build_tiny_llava(tmp_path_factory.mktemp("search") / "model", image_px=32, num_layers=6)
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


def card_of(budget_bytes: int) -> GpuFacts:
    return replace(get_gpu("RTX 4060"), vram_bytes=budget_bytes)


def searched(config: TrainingConfig, spec: ModelSpec, budget_bytes: int, fixed: tuple[str, ...] = ()) -> Plan:
    def workload_of(variant: TrainingConfig) -> Workload:
        return largest_workload(variant, spec)

    return search(config, spec, card_of(budget_bytes), reserve_bytes=0, fixed=fixed, workload_of=workload_of)


def tried(config: TrainingConfig, spec: ModelSpec, budget_bytes: int) -> list[Plan]:
    """A plan of each variant, none of them left out."""
    plans = []
    for checkpointing, batch in itertools.product((True, False), (1, 2, 4)):
        changes = {CHECKPOINTING: checkpointing, BATCH: batch, ACCUMULATION: NUM_SAMPLES // batch}
        variant = with_changes(config, changes)
        assert variant is not None
        plans.append(plan(variant, spec, card_of(budget_bytes), reserve_bytes=0))
    return plans


def step_s(planned: Plan) -> float:
    assert planned.time is not None
    return planned.time.step_s


def test_it_finds_what_trying_everything_finds(config: TrainingConfig, spec: ModelSpec) -> None:
    plans = tried(config, spec, 1 << 40)
    peaks = sorted({planned.peak.device_bytes for planned in plans})
    assert len(peaks) > 3
    for budget_bytes in (peaks[0], peaks[len(peaks) // 2], peaks[-1]):
        fastest_s = min(step_s(planned) for planned in plans if planned.peak.device_bytes <= budget_bytes)
        found = searched(config, spec, budget_bytes)
        assert found.fits
        assert found.peak.device_bytes <= budget_bytes
        assert step_s(found) == pytest.approx(fastest_s)


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


def test_where_nothing_fits_it_offers_what_would(config: TrainingConfig, spec: ModelSpec) -> None:
    smallest = min(planned.peak.device_bytes for planned in tried(config, spec, 1 << 40))
    budget_bytes = smallest - 2 * MIB
    found = searched(config, spec, budget_bytes)
    assert found.fits is False
    assert found.alternatives
    for alternative in found.alternatives:
        variant = with_changes(config, alternative.settings)
        assert variant is not None
        assert plan(variant, spec, card_of(budget_bytes), reserve_bytes=0).fits
        assert alternative.device_bytes <= budget_bytes
    longest = found.alternatives[-1].settings.get("data.max_length")
    if longest is not None:  # the next longer one that was in question does not fit
        longer = with_changes(config, {**found.alternatives[-1].settings, "data.max_length": longest + 64})
        assert longer is not None
        assert not plan(longer, spec, card_of(budget_bytes), reserve_bytes=0).fits
    assert searched(config, spec, 300 * MIB).alternatives == ()  # less than the CUDA context


def test_what_it_offers_instead_of_a_fixed_batch_keeps_the_samples_of_a_step(
    config: TrainingConfig, spec: ModelSpec
) -> None:
    wide = with_changes(config, {BATCH: 4, ACCUMULATION: 2})
    narrow = with_changes(config, {BATCH: 1, ACCUMULATION: 8})
    assert wide is not None
    assert narrow is not None
    needed_bytes = plan(narrow, spec, card_of(1 << 40), reserve_bytes=0).peak.device_bytes
    found = searched(wide, spec, needed_bytes, fixed=(BATCH, CHECKPOINTING))
    assert found.fits is False
    assert [dict(alternative.settings) for alternative in found.alternatives] == [{BATCH: 1, ACCUMULATION: 8}]
    assert found.alternatives[0].device_bytes == needed_bytes


def test_what_it_offers_fits_in_validation_too(config: TrainingConfig, spec: ModelSpec) -> None:
    answering = config.model_copy(update={"validation": config.validation.model_copy(update={"num_generated": 4})})
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
    without = {path: off for _, path, off in _settings(found)}
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


def test_where_nothing_else_fits_it_streams_as_few_layers_as_will_do(config: TrainingConfig, spec: ModelSpec) -> None:
    """Beside a plan of each number of layers, on top of all changes that cost less."""
    cheaper = {CHECKPOINTING: True, "training.optimizer": "paged_adamw_8bit", "training.loss_chunk_tokens": 256}
    cheaper |= {"hardware.embedding_on_host": True}
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
    for limit_bytes, expected in ((allocated[5], 5), (allocated[4] - 1, 5), (allocated[3], 3), (allocated[6] - 1, 6)):
        candidates.limit_bytes = limit_bytes
        assert _fewest_streamed(candidates, cheaper) == expected


def test_a_model_that_can_not_keep_its_embedding_in_ram_is_not_offered_it(
    config: TrainingConfig, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heads(family: Any, model: Any) -> list[Any]:
        return [base_model(model).lm_head]

    monkeypatch.setattr(type(spec.family), "host_tables", heads)
    found = searched(config, spec, 900 * MIB)
    assert all("hardware.embedding_on_host" not in each.settings for each in found.alternatives)
    variant = with_changes(config, {"hardware.embedding_on_host": True})
    assert variant is not None
    with pytest.raises(ConfigError, match="its head computes with the same table"):
        plan(variant, spec, None, reserve_bytes=0)
