"""What each setting that saves memory is worth in a run: bytes of the card against seconds of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from eightgig.core.units import format_bytes
from eightgig.plan.allocator import replay
from eightgig.plan.candidates import Candidate, Candidates
from eightgig.plan.op_costs import OpCost
from eightgig.plan.plan import Lever, allocator_settings
from eightgig.plan.step_time import planned_time

WHOLE_LOSS_TOKENS = 1 << 20  # more than any micro-batch has

BYTES_16BIT = 2
FULL_STATE_BYTES = 8  # of a parameter in AdamW: two fp32 numbers


def levers_of(candidates: Candidates, changes: Mapping[str, Any]) -> tuple[Lever, ...]:
    """The levers that the variant with `changes` uses, the largest saving first."""
    found = candidates.get(changes)
    assert found is not None
    levers = [
        *_weights(candidates, found),
        *_optimizer(found),
        *_segments(found),
        *_by_simulation(candidates, found, changes, "hardware.gradient_checkpointing", False, "gradient checkpointing"),
        *_by_simulation(candidates, found, changes, "training.loss_chunk_tokens", WHOLE_LOSS_TOKENS, "loss in chunks"),
    ]
    return tuple(sorted(levers, key=lambda lever: -lever.saves_bytes))


def _by_simulation(
    candidates: Candidates, found: Candidate, changes: Mapping[str, Any], path: str, off: object, name: str
) -> Iterator[Lever]:
    """A lever whose effect is that of the run without it."""
    if path == "hardware.gradient_checkpointing" and not found.config.hardware.gradient_checkpointing:
        return
    without = candidates.get({**changes, path: off, "preset": None})  # a preset may not allow it; it is not planned
    if without is None:
        return
    saves_bytes = without.device_bytes - found.device_bytes
    if saves_bytes <= 0:
        return
    costs_s = 0.0
    if found.time is not None and without.time is not None:
        costs_s = found.time.step_s - without.time.step_s
    yield Lever(name, saves_bytes, costs_s, _reason(candidates, without.device_bytes))


def _reason(candidates: Candidates, without_bytes: int) -> str:
    over_bytes = without_bytes - candidates.budget_bytes
    if over_bytes > 0:
        return f"without it {format_bytes(over_bytes)} would be missing"
    return "without it the run would fit as well, with less room"


def _weights(candidates: Candidates, found: Candidate) -> Iterator[Lever]:
    """4-bit weights against the same in 16 bits; each product has to unpack them."""
    simulation = found.simulation
    if not simulation.num_4bit_parameters:
        return
    saves_bytes = BYTES_16BIT * simulation.num_4bit_parameters - simulation.weights_4bit_bytes
    costs_s = 0.0
    if candidates.rates is not None and found.time is not None:
        training = found.config.training
        unpacked = planned_time(
            _without_unpacking(simulation.micro_batch_costs),
            simulation.update_costs,
            candidates.rates,
            num_micro_batches=training.gradient_accumulation_steps,
            num_tokens=found.work.batch.num_tokens,
        )
        costs_s = found.time.step_s - unpacked.step_s
    yield Lever("4-bit weights", saves_bytes, costs_s, _reason(candidates, found.device_bytes + saves_bytes))


def _without_unpacking(costs: Mapping[OpCost, float]) -> dict[OpCost, float]:
    total: dict[OpCost, float] = {}
    for cost, count in costs.items():
        plain = replace(cost, prepared_bytes=0)
        total[plain] = total.get(plain, 0.0) + count
    return total


def _optimizer(found: Candidate) -> Iterator[Lever]:
    """8-bit states against fp32 ones."""
    simulation = found.simulation
    saves_bytes = FULL_STATE_BYTES * simulation.num_trained_parameters - simulation.optimizer_bytes
    if saves_bytes > 0:
        yield Lever("8-bit optimizer", saves_bytes, 0.0, "the update is as fast, and as good for adapters")


def _segments(found: Candidate) -> Iterator[Lever]:
    """Segments that grow against those of fixed size."""
    settings = allocator_settings()
    if not settings.expandable_segments:
        return
    fixed = replay(found.simulation.trace, replace(settings, expandable_segments=False))
    saves_bytes = fixed.peak_reserved_bytes - found.result.peak_reserved_bytes
    if saves_bytes > 0:
        yield Lever("expandable segments", saves_bytes, 0.0, "less of what PyTorch reserves lies idle")
