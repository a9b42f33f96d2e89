"""Step times: by hand on rates that make the arithmetic easy, their order, and beside steps measured on an H100."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from benchmarks.attained_rates import OUT, RECORD, rates_from
from benchmarks.step_time import RUNS
from benchmarks.step_time_accuracy import MEASURED, predict
from hypothesis import given
from hypothesis import strategies as st

from eightgig.plan import card_rates
from eightgig.plan.card_rates import ESTIMATED, CardRates, attained, rates_as_json, rates_of
from eightgig.plan.op_costs import ATTENTION, ATTENTION_BACKWARD, BESIDE, MEMORY, PREFETCH, PRODUCT, TRANSFER, OpCost
from eightgig.plan.step_time import device_seconds, issue_seconds, link_seconds, planned_time, seconds
from eightgig.registry.gpus import all_gpus, get_gpu, gpu_of_vram

BF16, FP32 = torch.bfloat16, torch.float32
ROUND = CardRates(
    product_flop_per_s=100.0,
    fp32_product_flop_per_s=10.0,
    attention_flop_per_s=50.0,
    attention_backward_flop_per_s=25.0,
    bytes_per_s=1000.0,
    transfer_bytes_per_s=20.0,
    kernel_s=0.5,
    issue_s=0.25,
    dispatch_s=1.0,
    basis="round numbers",
)


@pytest.mark.parametrize(
    ("cost", "expected_s"),
    [
        (OpCost(MEMORY, BF16, 0, 3000), 0.5 + 3),
        (OpCost(MEMORY, BF16, 0, 3000, num_kernels=4), 2 + 3),
        (OpCost(TRANSFER, BF16, 0, 3000), 0.5 + 150),
        (OpCost(PRODUCT, BF16, 700, 3000), 0.5 + 7),  # arithmetic binds
        (OpCost(PRODUCT, BF16, 100, 3000), 0.5 + 3),  # memory binds
        (OpCost(PRODUCT, BF16, 700, 3000, prepared_bytes=2000, num_kernels=4), 2 + 2 + 7),
        (OpCost(PRODUCT, FP32, 700, 3000), 0.5 + 70 + 3),
        (OpCost(ATTENTION, BF16, 700, 3000), 0.5 + 14),
        (OpCost(ATTENTION_BACKWARD, torch.float16, 700, 3000), 0.5 + 28),
        (OpCost(ATTENTION, FP32, 700, 3000), 0.5 + 70 + 3),
    ],
)
def test_an_operation_takes_its_launches_and_what_binds_it(cost: OpCost, expected_s: float) -> None:
    assert device_seconds({cost: 1}, ROUND) == pytest.approx(expected_s)
    assert device_seconds({cost: 3}, ROUND) == pytest.approx(3 * expected_s)


def test_what_is_fetched_meanwhile_takes_no_time_of_the_card_but_may_take_the_longest() -> None:
    computed, fetched = OpCost(MEMORY, BF16, 0, 9000), OpCost(PREFETCH, torch.uint8, 0, 3000)
    alone_s = device_seconds({computed: 10}, ROUND)
    assert device_seconds({computed: 10, fetched: 1}, ROUND) == alone_s
    assert seconds({computed: 100, fetched: 1}, ROUND) == device_seconds({computed: 100}, ROUND)
    assert seconds({computed: 1, fetched: 4}, ROUND) == link_seconds({fetched: 4}, ROUND) == pytest.approx(600)


def test_all_that_goes_beside_computing_shares_the_link() -> None:
    fetched, offloaded = OpCost(PREFETCH, torch.uint8, 0, 3000), OpCost(BESIDE, BF16, 0, 5000)
    assert seconds({fetched: 2, offloaded: 1}, ROUND) == pytest.approx((2 * 3000 + 5000) / ROUND.transfer_bytes_per_s)


def test_the_longer_of_card_and_cpu_is_what_it_takes() -> None:
    small, large = OpCost(MEMORY, BF16, 0, 100), OpCost(MEMORY, BF16, 0, 9000)
    assert seconds({small: 10}, ROUND) == issue_seconds({small: 10}, ROUND) == 10
    assert seconds({large: 10}, ROUND) == device_seconds({large: 10}, ROUND) == pytest.approx(95)
    assert seconds({small: 10, large: 1}, ROUND) == pytest.approx(10 * 0.6 + 9.5)
    assert seconds({}, ROUND) == 0


def test_copies_beside_computing_cost_only_what_they_take_longer() -> None:
    work = OpCost(MEMORY, torch.bfloat16, 0, 10**9)
    copied = OpCost(BESIDE, torch.bfloat16, 0, round(2 * seconds({work: 1}, ROUND) * ROUND.transfer_bytes_per_s))
    assert seconds({work: 3, copied: 1}, ROUND) == seconds({work: 3}, ROUND)
    assert seconds({work: 1, copied: 3}, ROUND) == pytest.approx(6 * seconds({work: 1}, ROUND))


def test_a_planned_run_makes_its_micro_batches_then_its_update() -> None:
    train, update = {OpCost(MEMORY, BF16, 0, 9500): 2}, {OpCost(MEMORY, FP32, 0, 100): 3}  # 20 s; 1.8 s, the CPU 3 s
    planned = planned_time(train, update, ROUND, num_micro_batches=4, num_tokens=83, steps_per_epoch=10)
    assert planned.step_s == pytest.approx(83)
    assert planned.tokens_per_s == pytest.approx(4)
    assert planned.epoch_s == pytest.approx(830)
    assert planned.basis == "round numbers"
    assert planned_time(train, update, ROUND, num_micro_batches=4, num_tokens=83).epoch_s is None


costs = st.dictionaries(
    st.builds(
        OpCost,
        st.sampled_from([PRODUCT, ATTENTION, ATTENTION_BACKWARD, MEMORY, TRANSFER]),
        st.sampled_from([BF16, FP32]),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(1, 4),
    ),
    st.integers(1, 1000),
    max_size=6,
)
NAMES = [field.name for field in fields(CardRates) if field.name != "basis"]


@given(costs, st.sampled_from(NAMES), st.floats(1, 100))
def test_a_faster_card_never_takes_longer(some: dict[OpCost, int], name: str, factor: float) -> None:
    faster = getattr(ROUND, name) * (1 / factor if name.endswith("_s") and "per" not in name else factor)
    assert seconds(some, replace(ROUND, **{name: faster})) <= seconds(some, ROUND) * (1 + 1e-9)


@given(costs, costs)
def test_more_work_never_takes_less_and_never_more_than_both_parts(
    some: dict[OpCost, int], more: dict[OpCost, int]
) -> None:
    both = {cost: some.get(cost, 0) + more.get(cost, 0) for cost in {*some, *more}}
    whole, parts = seconds(both, ROUND), (seconds(some, ROUND), seconds(more, ROUND))
    assert max(parts) * (1 - 1e-9) <= whole <= sum(parts) * (1 + 1e-9)


def test_the_shipped_rates_are_those_of_the_record() -> None:
    shipped = json.loads(OUT.read_text())
    record = json.loads(RECORD.read_text())
    assert shipped["rates"] == rates_as_json(rates_from(record, shipped["rates"]["dispatch_s"]))
    assert record["commit"] in shipped["source"]
    assert shipped["card"] == get_gpu(record["device"]["name"]).name


def test_the_measured_cards_own_data_sheet_gives_what_it_attained() -> None:
    known, card = attained()
    estimated = rates_of(card)
    assert estimated is not None
    assert estimated.basis == ESTIMATED
    # The copy is not scaled: the data sheet's link, of which 80 % are taken, is known for each card.
    assert replace(estimated, basis=known.basis, transfer_bytes_per_s=known.transfer_bytes_per_s) == known
    assert estimated.transfer_bytes_per_s == card.pcie_bytes_per_s
    assert estimated.transfer_bytes_per_s == pytest.approx(known.transfer_bytes_per_s, rel=0.15)


def test_an_estimate_keeps_to_the_data_sheet() -> None:
    for gpu in all_gpus():
        rates = rates_of(gpu)
        if gpu.matrix_flop_per_s is None:
            assert rates is None
            continue
        assert rates is not None
        assert gpu.fp32_flop_per_s is not None
        assert gpu.bandwidth_bytes_per_s is not None
        assert 0.6 < rates.product_flop_per_s / gpu.matrix_flop_per_s < 1
        assert 0.6 < rates.fp32_product_flop_per_s / gpu.fp32_flop_per_s < 1
        assert 0.6 < rates.bytes_per_s / gpu.bandwidth_bytes_per_s < 1
        assert rates.attention_backward_flop_per_s < rates.attention_flop_per_s < rates.product_flop_per_s
    assert rates_of(gpu_of_vram(8)) is None


@pytest.mark.parametrize(
    ("model", "num_tokens", "checkpointing"), [("qwen3-vl-2b", 19912, True), ("llava-1.5-7b", 8704, False)]
)
def test_a_step_bound_by_the_gpu_takes_what_an_h100_took(model: str, num_tokens: int, checkpointing: bool) -> None:
    rows = json.loads(MEASURED.read_text())["figures"]["runs"]
    index = next(
        index
        for index, row in enumerate(rows)
        if (row["model"], row["num_tokens"], row["checkpointing"]) == (model, num_tokens, checkpointing)
    )
    rates, _ = attained()
    predicted = predict(RUNS[index], rows[index], rates)
    assert predicted["gpu_binds"]
    assert abs(predicted["device_error"]) < 0.08
    assert abs(predicted["step_error"]) < 0.15


@pytest.mark.gpu
def test_rates_measured_in_a_few_seconds_are_those_of_the_record() -> None:
    import time

    known, card = attained()
    if get_gpu(torch.cuda.get_device_name()).name != card.name:
        pytest.skip(f"the record is of the {card.name}")
    started = time.perf_counter()
    rates = card_rates.measure_rates(torch.device("cuda"))
    assert time.perf_counter() - started < 5
    assert rates.basis == card_rates.MEASURED
    for name in NAMES:
        allowed = 0.5 if name in ("issue_s", "dispatch_s") else 0.1  # another day's CPU
        assert getattr(rates, name) == pytest.approx(getattr(known, name), rel=allowed), name
