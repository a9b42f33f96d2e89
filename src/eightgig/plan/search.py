"""The fastest settings that fit a card, keeping what the user fixed; and the nearest ones where none fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eightgig.config.fields import MIN_STREAMED_LAYERS
from eightgig.core.garbage import present_objects_kept
from eightgig.models.host_weights import EMBEDDING, STREAMED
from eightgig.plan.candidates import Candidate, Candidates, Changes, WorkloadOf
from eightgig.plan.card_rates import CardRates
from eightgig.plan.fewer_checkpointed import CHECKPOINTED_LAYERS, fewer_checkpointed
from eightgig.plan.levers import levers_of
from eightgig.plan.plan import Alternative, Plan, card_rates, told

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.registry.gpus import GpuFacts

CHECKPOINTING = "hardware.gradient_checkpointing"
BATCH = "training.batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"
OFFLOAD = "hardware.offload_layer_inputs"
TILES = "hardware.mlp_tile_tokens"
OPTIMIZER = "training.optimizer"
CHUNK = "training.loss_chunk_tokens"
LENGTH = "data.max_length"
PRESET = "preset"

MAX_BATCH = 16  # samples at once, twice the most measured (benchmarks/results/search_accuracy.json)
LENGTH_STEP_TOKENS = 64
# Of about the hidden size of a 7B model, as ALST has its tiles (arXiv 2506.13996): enough rows that unpacking the 4-bit
# weights anew for each tile is little beside the products.
TILE_TOKENS = 2048
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
    first.

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
    fitting = [
        *fewer_checkpointed(candidates, fitting, request.fixed),
        *fitting,
    ]  # the first of equally fast ones is taken
    for changes, _ in sorted(fitting, key=lambda pair: _seconds(pair[1])):
        planned = _plan(request, whole, changes)
        if planned.fits:
            return replace(planned, levers=levers_of(candidates, changes))
    planned = _plan(request, whole, {})
    return replace(planned, alternatives=tuple(_alternatives(request, whole)))


def _fitting(request: Request, candidates: Candidates) -> Iterator[tuple[Changes, Candidate]]:
    """Changes that fit, simulated in such an order that few are in vain: memory grows with the batch."""
    for checkpointing in _checkpointing(request):
        for batch in _batches(request):
            changes = checkpointing | batch
            found = candidates.get(changes)
            if found is None or not found.fits:
                break
            yield changes, found


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


def _seconds(found: Candidate) -> float:
    """Time of a step; where it is not known, fewer passes count as faster."""
    if found.time is not None:
        return found.time.step_s
    return float(found.config.training.gradient_accumulation_steps)


def _plan(request: Request, whole: Candidates, changes: Changes) -> Plan:
    """The whole plan, with validation, of the variant with `changes`, which can be had."""
    found = whole.get(changes)
    assert found is not None
    return told(found.config, request.spec, request.gpu, request.budget_bytes, found)


def _alternatives(request: Request, candidates: Candidates) -> Iterator[Alternative]:
    """What would fit, cheapest first: changes that cost time, then those that cost texts; each on top of the ones
    before it that alone don't suffice.
    """
    changes: dict[str, object] = {}
    for change, price in _cheap_changes(request):
        found = candidates.get({**changes, **change})
        if found is None:
            continue
        changes |= change
        if found.fits:
            yield _alternative(changes, found, price)
            return
    streamed = _fewest_streamed(candidates, changes)
    if streamed is not None:
        changes[STREAMED] = streamed
        found = candidates.get(changes)
        assert found is not None
        if found.fits:
            yield _alternative(changes, found, "their weights come from RAM in each pass")
            return
    length = _longest_length(request, candidates, changes)
    if length is not None:
        found = candidates.get({**changes, LENGTH: length})
        assert found is not None
        yield _alternative({**changes, LENGTH: length}, found, f"texts are cut at {length:,} tokens")


def _cheap_changes(request: Request) -> Iterator[tuple[dict[str, object], str]]:
    """Changes that leave what is learnt as it is."""
    config = request.config
    training = config.training
    if training.batch_size > 1:
        num_samples = training.batch_size * training.gradient_accumulation_steps
        yield {BATCH: 1, ACCUMULATION: num_samples}, "a step takes its samples one by one"
    if not config.hardware.gradient_checkpointing:
        yield {CHECKPOINTING: True}, "each layer is computed twice"
    if config.hardware.checkpointed_layers is not None:
        yield {CHECKPOINTED_LAYERS: None}, "every layer is computed twice"
    tokens = request.workload_of(config).batch.num_tokens // training.batch_size
    if tokens > TILE_TOKENS and (config.hardware.mlp_tile_tokens or tokens) > TILE_TOKENS:
        yield {TILES: TILE_TOKENS}, "the layers' MLPs take the tokens in tiles"
    if training.loss_chunk_tokens > SMALL_CHUNK_TOKENS:
        yield {CHUNK: SMALL_CHUNK_TOKENS}, "the loss is computed in more, smaller parts"
    if not config.hardware.offload_layer_inputs:
        yield {OFFLOAD: True}, "the layers' inputs wait in the host's memory, which must have room for them"
    yield {OPTIMIZER: "paged_adamw_8bit"}, "the optimizer's states move to the host where the card is full"
    if not config.hardware.embedding_on_host:
        yield {EMBEDDING: True}, "embeddings are looked up in RAM"


def _fewest_streamed(candidates: Candidates, changes: Changes) -> int | None:
    """The fewest streamed layers with which the run fits; all of them where none suffice, None where none can be.

    Each one more takes less of the card, until all are streamed.
    """
    counts = range(
        max(MIN_STREAMED_LAYERS, candidates.config.hardware.streamed_layers), candidates.num_decoder_layers + 1
    )
    if not counts or candidates.get({**changes, STREAMED: counts[-1]}) is None:
        return None

    def is_too_few(count: int) -> bool:
        found = candidates.get({**changes, STREAMED: count})
        return found is None or not found.fits

    too_few = longest_fit(counts, is_too_few)
    return counts[0] if too_few is None else min(too_few + 1, counts[-1])


def _longest_length(request: Request, candidates: Candidates, changes: Changes) -> int | None:
    lengths = range(LENGTH_STEP_TOKENS, request.config.data.max_length, LENGTH_STEP_TOKENS)

    def fits(length: int) -> bool:
        found = candidates.get({**changes, LENGTH: length})
        return found is not None and bool(found.fits)

    return longest_fit(lengths, fits)


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


def _alternative(changes: Changes, found: Candidate, price: str) -> Alternative:
    step_s = None if found.time is None else found.time.step_s
    return Alternative(dict(changes), found.device_bytes, step_s, price)
