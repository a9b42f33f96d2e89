"""Micro-batches that share a pass: when a plan chooses it, what it changes in the plan, and what it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.config import Batching, TrainingConfig
from eightgig.core.units import GIB
from eightgig.models.host_weights import STREAMED
from eightgig.plan.candidates import Candidates, with_changes
from eightgig.plan.card_rates import CardRates, rates_of
from eightgig.plan.chosen_levers import plan_with_levers
from eightgig.plan.levers import OFFLOAD, TOGETHER
from eightgig.plan.op_costs import MEMORY, PREFETCH, OpCost
from eightgig.plan.plan import plan, planned_precision
from eightgig.plan.search import search
from eightgig.plan.shared_passes import shared_passes
from eightgig.plan.simulate import simulate
from eightgig.plan.step_time import seconds
from eightgig.plan.workload import LargestWorkloads
from eightgig.registry import ModelSpec, resolve
from eightgig.registry.gpus import GpuFacts, get_gpu

NUM_LAYERS = 10
CARD = replace(get_gpu("RTX 4060"), vram_bytes=4 * GIB)
LAYER_BYTES, ROW_BYTES, BASE_BYTES = 100, 30, 1000
# A byte a second, kernels and their issue for nothing: times are bytes.
RATES = CardRates(
    product_flop_per_s=1.0,
    fp32_product_flop_per_s=1.0,
    attention_flop_per_s=1.0,
    attention_backward_flop_per_s=1.0,
    bytes_per_s=1.0,
    transfer_bytes_per_s=1.0,
    kernel_s=0.0,
    issue_s=0.0,
    dispatch_s=0.0,
    basis="made up",
)


class MadeUp:
    """Variants of a run whose every micro-batch computes for `compute_s`, with layers of LAYER_BYTES."""

    num_decoder_layers = NUM_LAYERS

    def __init__(
        self,
        budget_bytes: int,
        compute_s: int,
        *,
        accumulation: int = 8,
        independent: bool = True,
        rates: CardRates | None = RATES,
        **hardware: Any,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.rates = rates
        self.spec = SimpleNamespace(family=SimpleNamespace(rows_are_independent=independent))
        self.asked = 0
        self._compute_s = compute_s
        training = {"gradient_accumulation_steps": accumulation}
        self.config = TrainingConfig.model_validate({"training": training, "hardware": hardware})

    def get(self, changes: Mapping[str, Any]) -> Any:
        self.asked += 1
        config = with_changes(self.config, changes)
        if config is None:
            return None
        levers = config.hardware.levers
        rows = levers.micro_batches_per_pass
        kept = 1 if levers.offload_layer_inputs else NUM_LAYERS
        streamed = max(levers.streamed_layers - 2, 0)
        peak_bytes = BASE_BYTES + rows * ROW_BYTES * kept - streamed * LAYER_BYTES
        costs: Counter[OpCost] = Counter()
        costs[OpCost(PREFETCH, torch.uint8, 0, 2 * streamed * LAYER_BYTES)] += 1
        costs[OpCost(MEMORY, torch.uint8, 0, self._compute_s)] += rows
        time = None
        if self.rates is not None:
            time = SimpleNamespace(step_s=config.passes_per_step * seconds(costs, self.rates))
        return SimpleNamespace(
            config=config,
            fits=peak_bytes <= self.budget_bytes,
            device_bytes=peak_bytes,
            time=time,
            simulation=SimpleNamespace(micro_batch_costs=costs),
        )


def chosen(made_up: MadeUp, **levers: Any) -> dict[str, Any]:
    return shared_passes(cast(Candidates, made_up), {}, {f"hardware.{name}": value for name, value in levers.items()})


def test_as_many_share_a_pass_as_hide_the_transfers() -> None:
    """Six layers travel there and back, 1,200 s; two micro-batches compute for 800 s, four for 1,600 s."""
    made_up = MadeUp(10_000, 400)
    assert chosen(made_up, streamed_layers=8) == {STREAMED: 8, TOGETHER: 4, OFFLOAD: True}
    assert chosen(MadeUp(10_000, 10), streamed_layers=8)[TOGETHER] == 8
    assert chosen(MadeUp(10_000, 400, offload_layer_inputs=False), streamed_layers=8) == {STREAMED: 8, TOGETHER: 4}
    assert chosen(MadeUp(10_000, 10, accumulation=6), streamed_layers=8)[TOGETHER] == 6


@pytest.mark.parametrize(
    ("made_up", "streamed"),
    [
        (MadeUp(10_000, 1300), 8),  # the card computes longer than weights travel
        (MadeUp(10_000, 400), 0),
        (MadeUp(10_000, 400, accumulation=1), 8),
        (MadeUp(10_000, 400, independent=False), 8),
        (MadeUp(10_000, 400, micro_batches_per_pass=1), 8),
        (MadeUp(10_000, 400, rates=None), 8),
    ],
)
def test_else_passes_stay_as_they_are(made_up: MadeUp, streamed: int) -> None:
    assert chosen(made_up, streamed_layers=streamed) == {STREAMED: streamed}
    assert made_up.asked <= 2


def test_more_layers_are_streamed_for_it_where_their_number_is_left_to_the_plan() -> None:
    """Eight rows want 240 bytes, two more layers than one row's 30; their time pays for it."""
    made_up = MadeUp(BASE_BYTES + ROW_BYTES - 3 * LAYER_BYTES, 10)
    ours = chosen(made_up, streamed_layers=5, offload_layer_inputs=True)
    assert ours == {STREAMED: 8, TOGETHER: 8, OFFLOAD: True}
    found = made_up.get(ours)
    assert found.fits
    assert found.time.step_s < made_up.get({STREAMED: 5, OFFLOAD: True}).time.step_s
    pinned = MadeUp(BASE_BYTES + ROW_BYTES - 3 * LAYER_BYTES, 10, streamed_layers=5, offload_layer_inputs=True)
    assert chosen(pinned) == {}


# From here on the plans are real.


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = build_tiny_llava(tmp_path_factory.mktemp("shared") / "model", image_px=32, num_layers=NUM_LAYERS)
    return resolve(str(folder))


def config_with(spec: ModelSpec, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": spec.location},
            "data": {"max_length": 64},
            "training": {"gradient_accumulation_steps": 4, "lora": {"rank": 8}},
            "validation": {"num_generated": 0},
            "hardware": hardware,
        }
    )


def test_a_pass_brings_weights_once_for_all_its_micro_batches(spec: ModelSpec) -> None:
    prefetched, tokens, samples = [], [], []
    for together in (1, 4):
        config = config_with(spec, streamed_layers=5, micro_batches_per_pass=together)
        work = LargestWorkloads(spec)(config)
        found = simulate(config, spec, work, planned_precision(config, None), (8, 6))
        costs = found.micro_batch_costs
        prefetched.append(sum(n * cost.moved_bytes for cost, n in costs.items() if cost.kind == PREFETCH))
        tokens.append(work.batch.num_tokens)
        samples.append((len(work.samples), len((work.validation or work).samples)))
    assert prefetched[0] == prefetched[1] > 0
    assert tokens[1] == 4 * tokens[0]
    assert samples == [(1, 1), (4, 1)]


def slow_link(gpu: GpuFacts) -> CardRates:
    """Rates with which a tiny model's layers take longer to come than to compute."""
    rates = rates_of(gpu)
    assert rates is not None
    return replace(rates, transfer_bytes_per_s=1e5)


def test_the_search_takes_it_where_the_user_wants_streamed_layers(spec: ModelSpec) -> None:
    pinned = {"streamed_layers": 6, "checkpointed_layers": None, "offload_layer_inputs": False}
    found = search(
        config_with(spec, **pinned),
        spec,
        CARD,
        reserve_bytes=0,
        fixed=("training.batch_size", "hardware.gradient_checkpointing"),
        workload_of=LargestWorkloads(spec),
        rates=slow_link(CARD),
    )
    assert found.fits
    assert found.config["hardware"]["micro_batches_per_pass"] == 4
    assert found.workload["num_samples"] == 4
    (lever,) = [lever for lever in found.levers if "a pass" in lever.name]
    assert lever.name == "4 micro-batches a pass"
    assert lever.saves_bytes < 0
    assert lever.costs_s is not None
    alone = plan(config_with(spec, **pinned), spec, CARD, reserve_bytes=0, rates=slow_link(CARD))
    assert found.time is not None
    assert alone.time is not None
    assert lever.costs_s == pytest.approx(found.time.step_s - alone.time.step_s)
    assert found.time.step_s < alone.time.step_s / 3  # a quarter, and the update
    assert found.time.tokens_per_s * found.time.step_s == pytest.approx(alone.time.tokens_per_s * alone.time.step_s)


def test_a_run_takes_what_its_plan_would(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` plans with rates from data sheets; slow ones stand in for those of a card with a slow link."""
    monkeypatch.setattr("eightgig.plan.chosen_levers.card_rates", slow_link)
    config = config_with(spec, streamed_layers=6, checkpointed_layers=None)
    found = plan_with_levers(config, spec, CARD, reserve_bytes=0, workload_of=LargestWorkloads(spec))
    assert found.config["hardware"]["micro_batches_per_pass"] == 4
    assert "4 micro-batches a pass" in [lever.name for lever in found.levers]


def test_a_number_that_does_not_divide_the_accumulation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a divisor of training\.gradient_accumulation_steps = 8"):
        TrainingConfig.model_validate(
            {"training": {"gradient_accumulation_steps": 8}, "hardware": {"micro_batches_per_pass": 3}}
        )
    config = TrainingConfig.model_validate(
        {
            "training": {"batch_size": 3, "gradient_accumulation_steps": 8},
            "hardware": {"micro_batches_per_pass": 4},
        }
    )
    assert (config.samples_per_pass, config.passes_per_step) == (12, 2)


def test_rows_that_samples_share_go_through_one_by_one(spec: ModelSpec) -> None:
    """A pass takes one row there, which can't be divided: the plan leaves it at that, and a user's wish is refused."""
    config = config_with(spec, streamed_layers=6, checkpointed_layers=None, offload_layer_inputs=False)
    packed = config.model_copy(update={"training": config.training.model_copy(update={"batching": Batching.PACKED})})
    found = search(
        packed,
        spec,
        CARD,
        reserve_bytes=0,
        fixed=("training.batch_size", "hardware.gradient_checkpointing"),
        workload_of=LargestWorkloads(spec),
        rates=slow_link(CARD),
    )
    assert found.fits
    assert found.config["hardware"]["micro_batches_per_pass"] == 1
    with pytest.raises(ValueError, match="1 where samples share rows"):
        TrainingConfig.model_validate({"training": {"batching": "packed"}, "hardware": {"micro_batches_per_pass": 2}})
