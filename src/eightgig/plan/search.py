"""The fastest settings that fit a card, keeping what the user fixed; and the nearest ones where none fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eightgig.config.levers import automatic_paths
from eightgig.core.garbage import present_objects_kept
from eightgig.models.host_weights import EMBEDDING, STREAMED
from eightgig.models.quantization import TOWER_IN_4BIT
from eightgig.plan.candidates import Candidate, Candidates, Changes, WorkloadOf
from eightgig.plan.card_rates import CardRates
from eightgig.plan.chosen_levers import (
    TILE_TOKENS,
    can_fit,
    every_lever,
    fitting_levers,
    needed_levers,
    pinned_levers,
)
from eightgig.plan.fewer_checkpointed import CHECKPOINTED_LAYERS, fewer_checkpointed
from eightgig.plan.fewest_streamed import fewest_streamed, tried
from eightgig.plan.levers import CHECKPOINTING, CHUNK, FEATURES, OFFLOAD, OPTIMIZER, TILES, levers_of
from eightgig.plan.plan import Alternative, Plan, card_rates, told
from eightgig.plan.shared_passes import shared_passes

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.registry.gpus import GpuFacts

BATCH = "training.batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"
LENGTH = "data.max_length"
PRESET = "preset"

MAX_BATCH = 16  # samples at once, twice the most measured (benchmarks/results/search_accuracy.json)
NO_DOUBT = 1.1  # times the budget
LENGTH_STEP_TOKENS = 64
SMALL_CHUNK_TOKENS = 256  # as preset ultra_low_memory has it


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        reserve_bytes: of the card's memory, kept free.
        fixed: paths of the settings that the user chose; the others may change.
        rates: of the card, where it was measured.
    """

    config: TrainingConfig
    spec: ModelSpec
    gpu: GpuFacts
    reserve_bytes: int
    fixed: Collection[str]
    workload_of: WorkloadOf
    rates: CardRates | None

    @property
    def budget_bytes(self) -> int:
        """What the run may take of the card."""
        return self.gpu.vram_bytes - self.reserve_bytes


def search(
    config: TrainingConfig,
    spec: ModelSpec,
    gpu: GpuFacts,
    *,
    reserve_bytes: int,
    fixed: Collection[str],
    workload_of: WorkloadOf,
    rates: CardRates | None = None,
) -> Plan:
    """The plan of the fastest settings that fit, with its levers; of `config` as it is, with alternatives, if none do.

    Searched are activation checkpointing, how many samples go through at once where their number in a step stays the
    same, and how many layers are checkpointed. Of settings equally fast the first stays, and `config` itself stands
    first. Where none of them fits, the levers that are left to the plan are taken in (`chosen_levers`).

    Args:
        config: where to begin.
        spec: its model.
        gpu: the card.
        reserve_bytes: of the card's memory, kept free.
        fixed: paths of the settings that stay.
        workload_of: makes the largest micro-batch of some settings.
        rates: of the card, where it was measured; None: estimated from its data sheet.

    Raises:
        UnsupportedModel: the model can't be planned.
    """
    request = Request(config, spec, gpu, reserve_bytes, fixed, workload_of, rates or card_rates(gpu))
    candidates = Candidates(config, spec, gpu, request.budget_bytes, workload_of, request.rates)
    with present_objects_kept():
        return _fastest(request, candidates)


def _fastest(request: Request, candidates: Candidates) -> Plan:
    whole = candidates.with_validation()
    fitting = list(_fitting(request, candidates))
    fewer = fewer_checkpointed(
        candidates, fitting, pinned_levers(candidates), _without_checkpointing(request, candidates)
    )
    fitting = [*fewer, *fitting]  # the first of equally fast ones is taken
    for changes, _ in sorted(fitting, key=lambda pair: _seconds(pair[1])):
        planned = _plan(request, whole, changes)
        if planned.fits:
            faster = shared_passes(whole, changes, {})  # layers may be streamed because the user wants it
            planned = _plan(request, whole, {**changes, **faster}) if faster else planned
            return replace(planned, levers=levers_of(candidates, {**changes, **faster}))
    smallest = _smallest(request)
    levers = fitting_levers(whole, smallest)
    if levers is not None:
        changes = {**smallest, **levers}
        return replace(_plan(request, whole, changes), levers=levers_of(whole, changes))
    planned = _plan(request, whole, {})
    return replace(planned, alternatives=tuple(_alternatives(request, whole)))


def _fitting(request: Request, candidates: Candidates) -> Iterator[tuple[Changes, Candidate]]:
    """Changes that fit, simulated in such an order that few are in vain: memory grows with the batch."""
    for checkpointing in _checkpointing(request):
        smaller: list[Candidate] = []
        for batch in _batches(request):
            changes = checkpointing | batch
            size = batch.get(BATCH, request.config.training.batch_size)
            if _is_out_of_reach(size, smaller, candidates.budget_bytes):
                break
            found = candidates.get(changes)
            if found is None or not found.fits:
                break
            smaller.append(found)
            yield changes, found


def _is_out_of_reach(size: int, smaller: Sequence[Candidate], budget_bytes: int) -> bool:
    """Whether the last two of the `smaller` batches leave no doubt that one of `size` samples does not fit.

    Memory is nearly a straight line in the samples that go through at once.
    """
    if len(smaller) < 2:
        return False
    (size_0, bytes_0), (size_1, bytes_1) = (
        (found.config.training.batch_size, found.device_bytes) for found in smaller[-2:]
    )
    estimated_bytes = bytes_1 + (bytes_1 - bytes_0) / (size_1 - size_0) * (size - size_1)
    return estimated_bytes > NO_DOUBT * budget_bytes


def _without_checkpointing(request: Request, candidates: Candidates) -> Candidate | None:
    """The smallest variant that checkpoints no layer, where the search has come to it."""
    if CHECKPOINTING in request.fixed or not request.config.hardware.gradient_checkpointing:
        return None
    return candidates.get({**_checkpointing(request)[1], **_batches(request)[0]})


def _checkpointing(request: Request) -> list[dict[str, object]]:
    """As configured, and the other way; a preset that no one asked for need not be kept."""
    if CHECKPOINTING in request.fixed:
        return [{}]
    other: dict[str, object] = {CHECKPOINTING: not request.config.hardware.gradient_checkpointing}
    return [{}, other if PRESET in request.fixed else {**other, PRESET: None}]


def _batches(request: Request) -> list[dict[str, int]]:
    """Ways to take a step's samples, fewer at once first; among them the one that is configured."""
    training = request.config.training
    if BATCH in request.fixed or ACCUMULATION in request.fixed:
        return [{}]
    num_samples = training.batch_size * training.gradient_accumulation_steps
    sizes = [size for size in range(1, min(num_samples, MAX_BATCH) + 1) if num_samples % size == 0]
    return [{} if size == training.batch_size else {BATCH: size, ACCUMULATION: num_samples // size} for size in sizes]


def _smallest(request: Request) -> dict[str, object]:
    """What takes the least of what is searched: few samples at once, and layers checkpointed."""
    checkpoints = CHECKPOINTING in request.fixed or request.config.hardware.gradient_checkpointing
    return {**_batches(request)[0], **({} if checkpoints else {CHECKPOINTING: True})}


def _seconds(found: Candidate) -> float:
    """Time of a step; where it is not known, fewer passes count as faster."""
    if found.time is not None:
        return found.time.step_s
    return float(found.config.training.gradient_accumulation_steps)


def _plan(request: Request, whole: Candidates, changes: Changes) -> Plan:
    """The whole plan, with validation, of the variant with `changes`, which can be had."""
    found = whole.get(changes) if changes else whole.given()
    assert found is not None
    return told(found.config, request.spec, request.gpu, request.budget_bytes, found)


def _alternatives(request: Request, candidates: Candidates) -> Iterator[Alternative]:
    """What would fit, cheapest first: changes that cost time, then a tower in 4 bits, then those that cost texts; each
    on top of the ones before it that alone don't suffice, and with the levers that are left to the plan.
    """
    changes: dict[str, object] = {}
    for change, price in _cheap_changes(request):
        if tried(candidates, {**changes, **change}) is None:
            continue
        changes |= change
        levers = needed_levers(candidates, changes)
        if levers is not None:
            yield _alternative(candidates, {**changes, **levers}, price)
            return
    if STREAMED not in automatic_paths(request.config):
        streamed = fewest_streamed(candidates, {**changes, **every_lever(candidates, changes)})
        if streamed is not None:
            levers = needed_levers(candidates, {**changes, STREAMED: streamed})
            assert levers is not None
            yield _alternative(candidates, {**changes, STREAMED: streamed, **levers}, "their weights come from RAM")
            return
    if _tower_in_4bit_saves(request, candidates, changes):
        changes[TOWER_IN_4BIT] = True
        levers = needed_levers(candidates, changes)
        if levers is not None:
            price = "the vision tower's features change a little; the run's receipt says how much"
            yield _alternative(candidates, {**changes, **levers}, price)
            return
    length = _longest_length(request, candidates, changes)
    if length is not None:
        shorter = {**changes, LENGTH: length}
        levers = needed_levers(candidates, shorter)
        assert levers is not None
        yield _alternative(candidates, {**shorter, **levers}, f"texts are cut at {length:,} tokens")


def _tower_in_4bit_saves(request: Request, candidates: Candidates, changes: Changes) -> bool:
    """Whether the run with `changes` takes less of the card with its vision tower in 4 bits, and is not so already."""
    if request.config.training.quantization.vision_tower:
        return False
    changes = {**changes, **every_lever(candidates, changes)}
    without, found = candidates.get(changes), candidates.get({**changes, TOWER_IN_4BIT: True})
    return without is not None and found is not None and found.device_bytes < without.device_bytes


def _cheap_changes(request: Request) -> Iterator[tuple[dict[str, object], str]]:
    """Changes that leave what is learnt as it is, of settings that the plan may not choose itself."""
    config = request.config
    training, levers, automatic = config.training, config.hardware.levers, automatic_paths(config)
    if training.batch_size > 1:
        num_samples = training.batch_size * training.gradient_accumulation_steps
        yield {BATCH: 1, ACCUMULATION: num_samples}, "a step takes its samples one by one"
    if not config.hardware.gradient_checkpointing:
        yield {CHECKPOINTING: True}, "each layer is computed twice"
    if levers.checkpointed_layers is not None:
        yield {CHECKPOINTED_LAYERS: None}, "every layer is computed twice"
    batch = request.workload_of(config).batch
    tokens = batch.num_tokens // len(batch.labels)  # of a row
    if TILES not in automatic and tokens > TILE_TOKENS and (levers.mlp_tile_tokens or tokens) > TILE_TOKENS:
        yield {TILES: TILE_TOKENS}, "the layers' MLPs take the tokens in tiles"
    if training.loss_chunk_tokens > SMALL_CHUNK_TOKENS:
        yield {CHUNK: SMALL_CHUNK_TOKENS}, "the loss is computed in more, smaller parts"
    if OFFLOAD not in automatic and not levers.offload_layer_inputs:
        yield {OFFLOAD: True}, "the layers' inputs wait in the host's memory, which must have room for them"
    yield {OPTIMIZER: "paged_adamw_8bit"}, "the optimizer's states move to the host where the card is full"
    if EMBEDDING not in automatic and not levers.embedding_on_host:
        yield {EMBEDDING: True}, "embeddings are looked up in RAM"
    if FEATURES not in automatic and not levers.cache_image_features:
        yield {FEATURES: True}, "images go through the vision tower once, and their features are kept on the disk"


def _longest_length(request: Request, candidates: Candidates, changes: Changes) -> int | None:
    lengths = range(LENGTH_STEP_TOKENS, request.config.data.max_length, LENGTH_STEP_TOKENS)
    return longest_fit(lengths, lambda length: can_fit(candidates, {**changes, LENGTH: length}))


def longest_fit(lengths: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The last of the ascending `lengths` that fits, None if none does; what fits must fit at every shorter length.

    Asks at most ceil(log2(number of lengths + 1)) times.
    """
    first, end = 0, len(lengths)  # all before `first` fit, none from `end` on
    while first < end:
        middle = (first + end) // 2
        if fits(lengths[middle]):
            first = middle + 1
        else:
            end = middle
    return lengths[first - 1] if first else None


def _alternative(candidates: Candidates, changes: Changes, price: str) -> Alternative:
    found = candidates.get(changes)
    assert found is not None
    step_s = None if found.time is None else found.time.step_s
    return Alternative(dict(changes), found.device_bytes, step_s, price)
