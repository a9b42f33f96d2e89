"""Which levers a plan chooses for what is left to it: beside every combination of made-up ones, and on a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_families import llava

from eightgig.config import TrainingConfig
from eightgig.config.levers import AUTO, LEVER_NAMES, automatic_paths, settled
from eightgig.core.errors import ConfigError, UnsupportedModel
from eightgig.core.units import GIB, MIB
from eightgig.models.host_weights import EMBEDDING, STREAMED
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.candidates import Candidates, with_changes
from eightgig.plan.chosen_levers import (
    TILE_TOKENS,
    can_fit,
    fitting_levers,
    needed_levers,
    plan_with_levers,
)
from eightgig.plan.fewer_checkpointed import CHECKPOINTED_LAYERS
from eightgig.plan.levers import CHECKPOINTING, FEATURES, OFFLOAD, TILES
from eightgig.plan.plan import Plan, plan
from eightgig.plan.search import BATCH, search
from eightgig.plan.workload import LargestWorkloads, largest_workload
from eightgig.registry import ModelSpec
from eightgig.registry.gpus import GpuFacts, get_gpu

NUM_LAYERS = 8
BASE_BYTES = 1000
BASE_S = 10.0
LIGHT = {EMBEDDING: True, OFFLOAD: True, FEATURES: True, TILES: TILE_TOKENS}


class MadeUp:
    """Variants whose memory and time are sums of what each lever saves and costs; see `Candidates`."""

    num_decoder_layers = NUM_LAYERS

    def __init__(
        self,
        budget_bytes: int,
        saves_bytes: Mapping[str, int],
        costs_s: Mapping[str, float] | None = None,
        *,
        layer_bytes: int = 0,
        whole_layer_bytes: int = 10**6,
        impossible: frozenset[str] = frozenset(),
        pinned: Mapping[str, Any] | None = None,
        num_tokens: int = 2 * TILE_TOKENS,
        num_images: int = 1,
    ) -> None:
        self.budget_bytes = budget_bytes + CONTEXT_BYTES
        self.config = TrainingConfig.model_validate({"hardware": dict(pinned or {})})
        self.asked: list[dict[str, Any]] = []
        self._saves_bytes, self._costs_s = saves_bytes, costs_s
        self._layer_bytes, self._whole_layer_bytes = layer_bytes, whole_layer_bytes
        self._impossible = impossible
        self._batch = SimpleNamespace(num_tokens=num_tokens, num_images=num_images)

    def bytes_of(self, config: TrainingConfig) -> int:
        levers = config.hardware.levers
        used = [path for path in LIGHT if getattr(levers, path.partition(".")[2])]
        streamed_bytes = max(levers.streamed_layers - 2, 0) * self._layer_bytes
        whole_bytes = (NUM_LAYERS - (levers.checkpointed_layers or NUM_LAYERS)) * self._whole_layer_bytes
        return BASE_BYTES - sum(self._saves_bytes.get(path, 0) for path in used) - streamed_bytes + whole_bytes

    def get(self, changes: Mapping[str, Any]) -> Any:
        self.asked.append(dict(changes))
        config = with_changes(self.config, changes)
        if config is None or self._impossible & set(changes):
            return None
        peak_bytes = self.bytes_of(config)
        levers = config.hardware.levers
        used = [path for path in LIGHT if getattr(levers, path.partition(".")[2])]
        time = None
        if self._costs_s is not None:
            costs = self._costs_s
            time = SimpleNamespace(step_s=BASE_S + sum(costs.get(path, 0.0) for path in used))
        return SimpleNamespace(
            config=config,
            fits=peak_bytes <= self.budget_bytes - CONTEXT_BYTES,
            device_bytes=peak_bytes + CONTEXT_BYTES,
            result=SimpleNamespace(peak_reserved_bytes=peak_bytes),
            time=time,
            work=SimpleNamespace(batch=self._batch),
        )


def needed(made_up: MadeUp, base: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    return needed_levers(cast(Candidates, made_up), base or {})


def subsets(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(len(values) + 1):
        for paths in itertools.combinations(values, number):
            yield {path: values[path] for path in paths}


def fits(made_up: MadeUp, changes: Mapping[str, Any]) -> bool:
    found = made_up.get(changes)
    return found is not None and found.fits


PINNED = {"embedding_on_host": False, "offload_layer_inputs": False, "cache_image_features": False}
PINNED |= {"mlp_tile_tokens": None, "streamed_layers": 0, "micro_batches_per_pass": 1}


@given(st.data())
def test_beside_every_combination(data: st.DataObject) -> None:
    saves = {path: data.draw(st.integers(0, 200)) for path in LIGHT}
    costs = data.draw(st.none() | st.just({path: data.draw(st.floats(-1, 3)) for path in LIGHT}))
    pinned = {name: value for name, value in PINNED.items() if data.draw(st.booleans())}
    impossible = frozenset(path for path in LIGHT if data.draw(st.integers(0, 4)) == 0)
    made_up = MadeUp(
        data.draw(st.integers(0, 1100)),
        saves,
        costs,
        layer_bytes=data.draw(st.integers(0, 100)),
        impossible=impossible,
        pinned=pinned,
        num_tokens=data.draw(st.sampled_from([TILE_TOKENS, TILE_TOKENS + 1])),
        num_images=data.draw(st.integers(0, 1)),
    )
    usable = {path: value for path, value in LIGHT.items() if path.partition(".")[2] not in pinned}
    if not made_up._batch.num_images:
        usable.pop(FEATURES, None)
    if made_up._batch.num_tokens <= TILE_TOKENS:
        usable.pop(TILES, None)
    streams = "streamed_layers" not in pinned
    light_fits = [changes for changes in subsets(usable) if fits(made_up, changes)]
    counts = range(3, NUM_LAYERS + 1) if streams else ()
    streamed_fits = [
        {**changes, STREAMED: count}
        for changes in subsets(usable)
        for count in counts
        if fits(made_up, {**changes, STREAMED: count})
    ]
    chosen = needed(made_up)
    assert can_fit(cast(Candidates, made_up), {}) is (chosen is not None)
    if chosen is None:
        assert not light_fits
        assert not streamed_fits
        return
    assert set(chosen) <= {*usable, STREAMED}
    assert fits(made_up, chosen)
    assert (STREAMED in chosen) is (not light_fits)
    for path in chosen:  # nothing in it is needless
        assert not fits(made_up, {other: value for other, value in chosen.items() if other != path})
    if {} in light_fits:
        assert chosen == {}
    elif streams and STREAMED in chosen and costs is None:  # no tiles that cost time: as few layers as can be
        assert chosen[STREAMED] == min(changes[STREAMED] for changes in streamed_fits)


def test_the_cheapest_comes_first_and_of_equally_cheap_ones_what_saves_more() -> None:
    saves = {EMBEDDING: 100, OFFLOAD: 300, FEATURES: 250, TILES: 500}
    # Features save time, which a first pass has to earn back: they count as free. Tiles cost a fifth of a step.
    costs = {EMBEDDING: 0.01, OFFLOAD: 0.0, FEATURES: -0.5, TILES: 2.0}
    assert needed(MadeUp(BASE_BYTES - 50, saves, costs)) == {OFFLOAD: True}
    assert needed(MadeUp(BASE_BYTES - 500, saves, costs)) == {OFFLOAD: True, FEATURES: True}
    costs[OFFLOAD] = 0.2
    assert needed(MadeUp(BASE_BYTES - 50, saves, costs)) == {FEATURES: True}
    assert needed(MadeUp(BASE_BYTES - 50, saves, costs, pinned=PINNED | {"mlp_tile_tokens": AUTO})) == {
        TILES: TILE_TOKENS
    }


def test_what_a_later_lever_makes_needless_is_left_out_again() -> None:
    saves = {EMBEDDING: 30, OFFLOAD: 20, FEATURES: 10, TILES: 400}
    costs = {EMBEDDING: 0.0, OFFLOAD: 0.0, FEATURES: 0.0, TILES: 2.0}
    assert needed(MadeUp(BASE_BYTES - 350, saves, costs)) == {TILES: TILE_TOKENS}
    assert needed(MadeUp(BASE_BYTES - 410, saves, costs)) == {EMBEDDING: True, TILES: TILE_TOKENS}


def test_layers_are_streamed_rather_than_tiles_taken_that_cost_time() -> None:
    saves = {EMBEDDING: 30, OFFLOAD: 0, FEATURES: 0, TILES: 100}
    slow, free = {TILES: 2.0}, {TILES: 0.0}
    assert needed(MadeUp(BASE_BYTES - 330, saves, slow, layer_bytes=100)) == {EMBEDDING: True, STREAMED: 5}
    assert needed(MadeUp(BASE_BYTES - 330, saves, free, layer_bytes=100)) == {
        EMBEDDING: True,
        TILES: TILE_TOKENS,
        STREAMED: 4,
    }


def test_few_simulations_are_needed() -> None:
    fitting = MadeUp(BASE_BYTES, {})
    assert needed(fitting) == {}
    assert len(fitting.asked) == 1
    streaming = MadeUp(BASE_BYTES - 450, {path: 20 for path in LIGHT}, layer_bytes=100, num_tokens=100)
    assert needed(streaming) == {EMBEDDING: True, OFFLOAD: True, FEATURES: True, STREAMED: 6}
    distinct = {tuple(sorted(changes.items())) for changes in streaming.asked}
    assert len(distinct) <= 9  # as given, all light ones, all layers, two counts, and four without one of them each


def test_spare_memory_becomes_whole_layers() -> None:
    made_up = MadeUp(BASE_BYTES + 35, {}, {}, whole_layer_bytes=10)
    chosen = fitting_levers(cast(Candidates, made_up), {})
    assert chosen == {CHECKPOINTED_LAYERS: NUM_LAYERS - 3}
    given = MadeUp(BASE_BYTES + 35, {}, {}, whole_layer_bytes=10, pinned={"checkpointed_layers": None})
    assert fitting_levers(cast(Candidates, given), {}) == {}
    lever = MadeUp(BASE_BYTES - 50, {EMBEDDING: 75}, {}, whole_layer_bytes=10)
    assert fitting_levers(cast(Candidates, lever), {}) == {EMBEDDING: True, CHECKPOINTED_LAYERS: NUM_LAYERS - 2}


# From here on the plans are real: a tiny LLaVA with a tower of 32 MiB, long rows, and so levers of some MiB each.


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    tower = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**llava.FACTS.architecture["vision_config"], **tower}
    facts = replace(llava.FACTS, architecture={**llava.FACTS.architecture, "vision_config": vision})
    return ModelSpec(llava.TINY[0].family, facts)


def config_of(**hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "data": {"max_length": 2048},
            "training": {"batch_size": 8, "gradient_accumulation_steps": 2, "lora": {"rank": 4}},
            "validation": {"num_generated": 0},
            "hardware": hardware,
        }
    )


def card_of(vram_bytes: int) -> GpuFacts:
    return replace(get_gpu("RTX 4060"), vram_bytes=vram_bytes)


def chosen_plan(config: TrainingConfig, spec: ModelSpec, vram_bytes: int) -> Plan:
    return plan_with_levers(config, spec, card_of(vram_bytes), reserve_bytes=0, workload_of=LargestWorkloads(spec))


def plain_plan(config: TrainingConfig, spec: ModelSpec, vram_bytes: int) -> Plan:
    return plan(config, spec, card_of(vram_bytes), reserve_bytes=0)


def levers_in(planned: Plan) -> dict[str, Any]:
    """The levers of the planned settings that are not plain, by path."""
    plain = settled(TrainingConfig()).hardware
    found = {name: planned.config["hardware"][name] for name in LEVER_NAMES}
    return {f"hardware.{name}": value for name, value in found.items() if value != getattr(plain, name)}


def test_a_real_run_that_does_not_fit_gets_what_it_takes_and_fits_with_it(spec: ModelSpec) -> None:
    plain = plain_plan(config_of(), spec, 1 << 40)
    budget_bytes = plain.peak.device_bytes - 8 * MIB
    found = chosen_plan(config_of(), spec, budget_bytes)
    assert found.fits
    chosen = {path for path in levers_in(found) if path != CHECKPOINTED_LAYERS}
    assert len(chosen) == 1
    again = plain_plan(TrainingConfig.model_validate(found.config), spec, budget_bytes)
    assert again.fits
    assert again.peak == found.peak
    lever = max(found.levers, key=lambda each: each.saves_bytes)
    assert lever.saves_bytes >= 8 * MIB
    assert "would be missing" in lever.reason
    pinned = {path.partition(".")[2]: False if path != TILES else None for path in chosen}
    other = chosen_plan(config_of(**pinned), spec, budget_bytes)
    assert other.fits
    assert not chosen & set(levers_in(other))
    assert levers_in(other)


def test_where_nothing_suffices_the_settings_stay(spec: ModelSpec) -> None:
    found = chosen_plan(config_of(), spec, CONTEXT_BYTES + 4 * MIB)
    assert found.fits is False
    assert levers_in(found) == {}
    assert found.levers == ()
    assert AUTO not in found.config["hardware"].values() or found.config["hardware"]["device"] == AUTO


def test_a_run_with_room_gets_whole_layers_and_nothing_else(spec: ModelSpec) -> None:
    found = chosen_plan(config_of(), spec, 1 << 40)
    assert levers_in(found) == {CHECKPOINTED_LAYERS: 1}
    (lever,) = found.levers
    num_layers = spec.facts.architecture["text_config"]["num_hidden_layers"]
    assert lever.name == f"1 of {num_layers} layers checkpointed"
    assert lever.saves_bytes <= 0
    assert lever.costs_s is not None
    assert lever.costs_s < 0


def searched(config: TrainingConfig, spec: ModelSpec, vram_bytes: int) -> Plan:
    """As `eightgig plan` does it, the samples that go through at once being the user's own."""
    return search(
        config,
        spec,
        card_of(vram_bytes),
        reserve_bytes=0,
        fixed=(BATCH, CHECKPOINTING),
        workload_of=lambda variant: largest_workload(variant, spec),
    )


def test_the_search_takes_levers_where_nothing_else_fits_and_lists_them(spec: ModelSpec) -> None:
    budget_bytes = plain_plan(config_of(), spec, 1 << 40).peak.device_bytes - 8 * MIB
    found = searched(config_of(), spec, budget_bytes)
    assert found.fits
    assert found.alternatives == ()
    assert found.config == chosen_plan(config_of(), spec, budget_bytes).config
    names = {OFFLOAD: "layer inputs on the host", FEATURES: "image features kept", EMBEDDING: "embeddings in RAM"}
    names[TILES] = f"MLP in tiles of {TILE_TOKENS:,} tokens"
    (chosen,) = set(levers_in(found)) - {CHECKPOINTED_LAYERS}
    (lever,) = [lever for lever in found.levers if lever.name == names[chosen]]
    assert lever.saves_bytes >= 8 * MIB
    pinned = TrainingConfig.model_validate(found.config)
    assert searched(pinned, spec, budget_bytes).config == found.config


def test_alternatives_change_what_is_pinned_and_take_levers_along(spec: ModelSpec) -> None:
    everything = with_changes(config_of(), {BATCH: 1, "training.gradient_accumulation_steps": 16, **LIGHT})
    assert everything is not None
    budget_bytes = plain_plan(everything, spec, 1 << 40).peak.device_bytes
    found = searched(config_of(), spec, budget_bytes)
    assert found.fits is False
    assert levers_in(found) == {}
    (alternative,) = found.alternatives
    assert alternative.settings[BATCH] == 1
    assert alternative.device_bytes <= budget_bytes
    variant = with_changes(settled(config_of()), alternative.settings)
    assert variant is not None
    assert plain_plan(variant, spec, budget_bytes).fits


def test_a_trained_tower_is_not_kept(spec: ModelSpec) -> None:
    """Adapters inside the tower: its features change in every step."""
    lora = {"rank": 4, "target_modules": r".*\.(q_proj|v_proj)"}
    only_features = {name: value for name, value in PINNED.items() if name != "cache_image_features"}
    config = config_of(**only_features, checkpointed_layers=None)
    trained = TrainingConfig.model_validate(config.model_dump() | {"training": {"batch_size": 8, "lora": lora}})
    for given_config, is_kept in ((config, True), (trained, False)):
        assert automatic_paths(given_config) == {FEATURES}
        peak_bytes = plain_plan(given_config, spec, 1 << 40).peak.device_bytes
        found = chosen_plan(given_config, spec, peak_bytes - 2 * MIB)
        assert found.config["hardware"]["cache_image_features"] is is_kept
        assert found.fits is is_kept
    asked = config_of(cache_image_features=True).model_copy(update={"training": trained.training})
    with pytest.raises(ConfigError, match="inside the vision tower"):
        plain_plan(asked, spec, 1 << 40)


def test_a_tower_that_drops_at_random_is_not_kept(spec: ModelSpec) -> None:
    vision = {**spec.facts.architecture["vision_config"], "attention_dropout": 0.1}
    facts = replace(spec.facts, architecture={**spec.facts.architecture, "vision_config": vision})
    random_spec = ModelSpec(spec.family, facts)
    only_features = {name: value for name, value in PINNED.items() if name != "cache_image_features"}
    config = config_of(**only_features, checkpointed_layers=None)
    peak_bytes = plain_plan(config, random_spec, 1 << 40).peak.device_bytes
    found = chosen_plan(config, random_spec, peak_bytes - 2 * MIB)
    assert (found.fits, found.config["hardware"]["cache_image_features"]) == (False, False)
    with pytest.raises(UnsupportedModel, match="drops values at random"):
        plain_plan(config_of(cache_image_features=True), random_spec, 1 << 40)


def test_a_pinned_setting_that_the_model_can_not_have_is_an_error(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="streamed_layers"):
        chosen_plan(config_of(streamed_layers=99), spec, GIB)
