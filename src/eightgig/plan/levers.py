"""What each setting that saves memory is worth in a run: bytes of the card against seconds of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

from eightgig.config import OptimizerName
from eightgig.core.units import format_bytes
from eightgig.models.host_weights import EMBEDDING, STREAMED
from eightgig.models.quantization import TOWER_IN_4BIT
from eightgig.plan.allocator import replay
from eightgig.plan.candidates import Candidate, Candidates
from eightgig.plan.op_costs import BESIDE, OpCost
from eightgig.plan.plan import Lever, allocator_settings, time_of

CHECKPOINTING, CHECKPOINTED_LAYERS, OFFLOAD, TILES, FEATURES, TOGETHER, CHUNK, OPTIMIZER = (
    "hardware.gradient_checkpointing",
    "hardware.checkpointed_layers",
    "hardware.offload_layer_inputs",
    "hardware.mlp_tile_tokens",
    "hardware.cache_image_features",
    "hardware.micro_batches_per_pass",
    "training.loss_chunk_tokens",
    "training.optimizer",
)
WHOLE_LOSS_TOKENS = 1 << 20  # more than any micro-batch has
BYTES_16BIT = 2


def levers_of(
    candidates: Candidates, changes: Mapping[str, Any], *, among: Set[str] | None = None
) -> tuple[Lever, ...]:
    """The levers that the variant with `changes` uses, the largest saving first.

    Args:
        candidates: makes the variants.
        changes: of one that can be had.
        among: paths; only levers that are one of these settings, and fewer checkpointed layers among them as a lever
            of their own, which takes memory and saves time. None: all but that.
    """
    found = candidates.get(changes)
    assert found is not None
    levers = [*_weights(candidates, found), *_segments(candidates, found)] if among is None else []
    for name, off, note in _settings(found, candidates.num_decoder_layers):
        if among is not None and not set(off) <= among:
            continue
        without = candidates.get({**changes, **off, "preset": None})  # a preset may forbid it; it is not planned
        if without is not None:
            for lever in _lever(candidates, found, name, without.device_bytes, _step_s(without)):
                levers.append(replace(lever, reason=f"{note}{lever.reason}"))
    if among is not None and CHECKPOINTED_LAYERS in among:
        levers += _whole_layers(candidates, found, changes)
    if among is None or TOGETHER in among:
        levers += _shared_passes(candidates, found, changes)
    return tuple(sorted(levers, key=lambda lever: -lever.saves_bytes))


def _whole_layers(candidates: Candidates, found: Candidate, changes: Mapping[str, Any]) -> Iterator[Lever]:
    """Fewer checkpointed layers, against all of them; none where all are."""
    num_layers = candidates.num_decoder_layers
    num_checkpointed = found.config.hardware.levers.checkpointed_layers
    all_of_them = candidates.get({**changes, CHECKPOINTED_LAYERS: None})
    if num_checkpointed is None or all_of_them is None:
        return
    name = f"{num_checkpointed} of {num_layers} layers checkpointed"
    yield _trade(found, all_of_them, name, "the card has room for the others as they are")


def _shared_passes(candidates: Candidates, found: Candidate, changes: Mapping[str, Any]) -> Iterator[Lever]:
    """Several micro-batches a pass, against one; none where it is one."""
    count = found.config.hardware.levers.micro_batches_per_pass
    one_by_one = candidates.get({**changes, TOGETHER: 1})
    if count > 1 and one_by_one is not None:
        reason = "the weights of streamed layers come once for all of them"
        yield _trade(found, one_by_one, f"{count} micro-batches a pass", reason)


def _trade(found: Candidate, without: Candidate, name: str, reason: str) -> Lever:
    """A lever that takes memory and saves time, against the run `without` it."""
    before_s, step_s = _step_s(without), _step_s(found)
    costs_s = None if before_s is None or step_s is None else step_s - before_s
    return Lever(name, without.device_bytes - found.device_bytes, costs_s, reason)


def _settings(found: Candidate, num_layers: int) -> Iterator[tuple[str, dict[str, object], str]]:
    """Levers that are settings in use: their name, the changes that leave them out, and what to say of them first."""
    config = found.config
    levers = config.hardware.levers
    if config.hardware.gradient_checkpointing:
        twice = levers.checkpointed_layers or num_layers
        without: dict[str, object] = {CHECKPOINTING: False, CHECKPOINTED_LAYERS: None, OFFLOAD: False}
        yield "gradient checkpointing", without, f"{twice} of {num_layers} layers are computed twice; "
    if levers.offload_layer_inputs:
        pinned = format_bytes(_offloaded_bytes(found))
        yield "layer inputs on the host", {OFFLOAD: False}, f"{pinned} of the host's memory are pinned; "
    if levers.mlp_tile_tokens is not None:
        yield f"MLP in tiles of {levers.mlp_tile_tokens:,} tokens", {TILES: None}, ""
    if levers.cache_image_features:
        yield "image features kept", {FEATURES: False}, ""
    if config.training.optimizer is not OptimizerName.ADAMW:
        yield "8-bit optimizer", {OPTIMIZER: OptimizerName.ADAMW.value}, ""
    if levers.embedding_on_host:
        yield "embeddings in RAM", {EMBEDDING: False}, ""
    if levers.streamed_layers:
        yield f"weights of {levers.streamed_layers} layers in RAM", {STREAMED: 0}, ""
    if config.training.quantization.vision_tower:
        yield "vision tower in 4 bits", {TOWER_IN_4BIT: False}, ""
    yield "loss in chunks", {CHUNK: WHOLE_LOSS_TOKENS}, ""


def _offloaded_bytes(found: Candidate) -> int:
    """What of layer inputs is on the host at one time: half of what moves, since it goes there and back."""
    costs = found.simulation.micro_batch_costs
    return round(sum(count * cost.moved_bytes for cost, count in costs.items() if cost.kind == BESIDE) / 2)


def _weights(candidates: Candidates, found: Candidate) -> Iterator[Lever]:
    """4-bit weights against the same in 16 bits; each product has to unpack them."""
    simulation = found.simulation
    saves_bytes = BYTES_16BIT * simulation.num_4bit_parameters - simulation.weights_4bit_bytes
    unpacked = replace(simulation, micro_batch_costs=_without_unpacking(simulation.micro_batch_costs))
    time = time_of(unpacked, found.config, found.work, candidates.rates)
    without_s = None if time is None else time.step_s
    yield from _lever(candidates, found, "4-bit weights", found.device_bytes + saves_bytes, without_s)


def _without_unpacking(costs: Mapping[OpCost, float]) -> dict[OpCost, float]:
    total: dict[OpCost, float] = {}
    for cost, count in costs.items():
        plain = replace(cost, prepared_bytes=0)
        total[plain] = total.get(plain, 0.0) + count
    return total


def _segments(candidates: Candidates, found: Candidate) -> Iterator[Lever]:
    """Segments that grow against those of fixed size: the same operations."""
    fixed = replay(found.simulation.trace, replace(allocator_settings(), expandable_segments=False))
    without_bytes = found.device_bytes + fixed.peak_reserved_bytes - found.result.peak_reserved_bytes
    yield from _lever(candidates, found, "expandable segments", without_bytes, _step_s(found))


def _lever(
    candidates: Candidates, found: Candidate, name: str, without_bytes: int, without_s: float | None
) -> Iterator[Lever]:
    """The lever between `found` and the run without it; none where that takes no more memory."""
    if without_bytes <= found.device_bytes:
        return
    step_s = _step_s(found)
    costs_s = None if step_s is None or without_s is None else step_s - without_s
    over_bytes = without_bytes - candidates.budget_bytes
    reason = "without it the run would fit as well, with less room"
    if over_bytes > 0:
        reason = f"without it {format_bytes(over_bytes)} would be missing"
    yield Lever(name, without_bytes - found.device_bytes, costs_s, reason)


def _step_s(candidate: Candidate) -> float | None:
    return None if candidate.time is None else candidate.time.step_s
