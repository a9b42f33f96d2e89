"""Weights that a planned run keeps on the host: what is left of them in its trace, and what their transfers cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.plan.trace_reading import left_by
from tests.tiny import build_tiny_llava
from tests.tiny_training import CPU, load_tiny

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.models.precision import Precision
from eightgig.plan.blocks import round_size
from eightgig.plan.op_costs import PREFETCH, TRANSFER
from eightgig.plan.plan import plan
from eightgig.plan.simulate import Simulation, Simulator
from eightgig.plan.trace import FREED
from eightgig.plan.workload import Workload, largest_workload
from eightgig.registry import ModelSpec, resolve

BF16 = Precision(compute_dtype=torch.bfloat16, mixed_precision=MixedPrecision.BF16, note=None)
NUM_LAYERS = 6
NUM_WEIGHTS = 4 * 64 * 64 + 3 * 64 * 128  # linear layers of one decoder layer


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder = build_tiny_llava(tmp_path_factory.mktemp("host") / "model", image_px=32, num_layers=NUM_LAYERS)
    return resolve(str(folder))


def config_with(spec: ModelSpec, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": spec.location},
            "data": {"max_length": 64},
            "training": {"gradient_accumulation_steps": 2, "lora": {"rank": 8}},
            "validation": {"num_generated": 1},
            "hardware": hardware,
        }
    )


@pytest.fixture(scope="module")
def work(spec: ModelSpec) -> Workload:
    return largest_workload(config_with(spec), spec)


@pytest.fixture(scope="module")
def simulator(spec: ModelSpec, work: Workload) -> Simulator:
    return Simulator(config_with(spec), spec, work.processor, BF16, (8, 6))


def fetched_bytes(simulation: Simulation, kind: str) -> float:
    return sum(count * cost.moved_bytes for cost, count in simulation.micro_batch_costs.items() if cost.kind == kind)


def block_bytes() -> int:
    """Of one layer: its weights two a byte, an 8-bit scale for 64 of them, each tensor from a multiple of 512 on."""
    return sum(
        count * (round_size(size // 2) + round_size(size // 64)) for count, size in ((4, 64 * 64), (3, 64 * 128))
    )


@pytest.mark.parametrize("streamed", [3, 5, 6])
def test_streamed_layers_leave_the_card_but_for_two_buffers(
    spec: ModelSpec, work: Workload, simulator: Simulator, streamed: int
) -> None:
    plain = simulator.run(config_with(spec), work)
    ours = simulator.run(config_with(spec, streamed_layers=streamed), work)
    before, after = (sum(map(round_size, left_by(run.trace, "load").values())) for run in (plain, ours))
    assert before - after == (streamed - 2) * block_bytes()
    peaks = [dict(run.trace.live_bytes()) for run in (plain, ours)]
    for phase in ("validate", "train"):
        assert peaks[0][phase] - peaks[1][phase] == (streamed - 2) * block_bytes()
    assert peaks[1]["load"] < peaks[0]["load"]
    assert ours.host_bytes == streamed * block_bytes()
    assert fetched_bytes(ours, PREFETCH) == 2 * (streamed - 2) * block_bytes()
    assert fetched_bytes(plain, PREFETCH) == 0


def test_while_loading_no_two_streamed_layers_are_on_the_card(
    spec: ModelSpec, work: Workload, simulator: Simulator
) -> None:
    """All linear weights in 4 bits: without the last layers' place the peak is that of a few resident parts."""
    trace = simulator.run(config_with(spec, streamed_layers=NUM_LAYERS), work).trace
    (_, first, end), *_ = trace.phases()
    packed_bytes = {64 * 64 // 2, 64 * 128 // 2}
    live: dict[int, int] = {}
    most = 0
    for block, size in list(trace)[first:end]:
        if size == FREED:
            live.pop(block)
        else:
            live[block] = size
        most = max(most, sum(size in packed_bytes for size in live.values()))
    resident = sum(size in packed_bytes for size in left_by(trace, "load").values())
    assert most <= resident + 2


def test_an_embedding_on_the_host_leaves_the_card_and_its_rows_travel(
    spec: ModelSpec, work: Workload, simulator: Simulator
) -> None:
    plain = simulator.run(config_with(spec), work)
    ours = simulator.run(config_with(spec, embedding_on_host=True), work)
    table_bytes = spec.facts.architecture["text_config"]["vocab_size"] * 64 * 2
    gone = sum(left_by(plain.trace, "load").values()) - sum(left_by(ours.trace, "load").values())
    assert gone == ours.host_bytes == table_bytes
    assert fetched_bytes(ours, TRANSFER) == work.batch.model_inputs["input_ids"].numel() * 64 * 2
    train = [dict(run.trace.live_bytes())["train"] for run in (plain, ours)]
    assert train[0] - train[1] == round_size(table_bytes)


def test_runs_on_one_model_do_not_touch_each_other(spec: ModelSpec, work: Workload, simulator: Simulator) -> None:
    in_ram = {"streamed_layers": 4, "embedding_on_host": True}
    for hardware in (in_ram, {}, {"streamed_layers": 6}, {**in_ram, "cache_image_features": True}, {}):
        config = config_with(spec, **hardware)
        ours = simulator.run(config, work)
        fresh = Simulator(config, spec, work.processor, BF16, (8, 6)).run(config, work)
        assert ours.trace.sizes_bytes == fresh.trace.sizes_bytes
        assert ours.trace.blocks == fresh.trace.blocks
        assert ours.micro_batch_costs == fresh.micro_batch_costs


def test_the_plan_says_what_a_real_run_keeps_in_ram(spec: ModelSpec) -> None:
    hardware = {"device": "cpu", "streamed_layers": 4, "embedding_on_host": True}
    config = config_with(spec, **hardware)
    loaded = load_tiny(spec.facts.folder, config)
    assert loaded.streamed is not None
    table = loaded.model.get_input_embeddings().weight
    assert table.device == CPU
    kept_bytes = loaded.streamed.host_bytes + table.numel() * table.element_size()
    assert plan(config, spec, None, reserve_bytes=0).host_bytes == kept_bytes


def test_more_layers_than_there_are_can_not_be_planned(spec: ModelSpec, work: Workload, simulator: Simulator) -> None:
    with pytest.raises(ConfigError, match="at most 6, the decoder layers of"):
        simulator.run(config_with(spec, streamed_layers=7), work)
