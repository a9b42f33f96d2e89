"""What "auto" stands for in the levers of a run on a card: nothing where it fits, else those that cost the least time.

What changes what is learnt (the length of texts, the rank, the samples of a step) is never chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from eightgig.config.levers import LEVER_NAMES, automatic_paths
from eightgig.models.host_weights import EMBEDDING, STREAMED
from eightgig.plan.candidates import Candidate, Candidates, Changes, WorkloadOf
from eightgig.plan.fewer_checkpointed import fewer_checkpointed
from eightgig.plan.fewest_streamed import fewest_streamed, fits, tried
from eightgig.plan.levers import FEATURES, OFFLOAD, TILES, levers_of
from eightgig.plan.plan import Plan, card_rates, told
from eightgig.plan.shared_passes import shared_passes

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.registry.gpus import GpuFacts

# Of about the hidden size of a 7B model, as ALST has its tiles (arXiv 2506.13996): enough rows that unpacking the 4-bit
# weights anew for each tile is little beside the products.
TILE_TOKENS = 2048
# Of a step. Prices that are nearer count as equal, and the lever that saves more comes first, so that few are needed:
# planned times are no more exact than this (docs/reference/plan_accuracy.md).
EQUAL_SHARE = 0.01


@dataclass(frozen=True)
class _Priced:
    """One lever alone.

    Attributes:
        price: more time of a step, in EQUAL_SHAREs of it; 0 where it saves time, or times are not known.
        saves_bytes: of the card.
    """

    changes: Changes
    price: int
    saves_bytes: int


def plan_with_levers(
    config: TrainingConfig, spec: ModelSpec, gpu: GpuFacts, *, reserve_bytes: int, workload_of: WorkloadOf
) -> Plan:
    """The plan of `config` on `gpu` with the levers that were chosen for what `config` leaves to the plan.

    `Plan.levers` has those alone. Where none would make the run fit, it is planned without any.

    Args:
        config: the run's settings; but for levers they are planned as they are.
        spec: its model.
        gpu: the card.
        reserve_bytes: of the card's memory, kept free for its other users.
        workload_of: makes the pass of some settings.

    Raises:
        ConfigError: the model does not go with `config`.
        UnsupportedModel: the model can't be planned.
    """
    budget_bytes = gpu.vram_bytes - reserve_bytes
    candidates = Candidates(config, spec, gpu, budget_bytes, workload_of, card_rates(gpu)).with_validation()
    given = candidates.given()
    levers = fitting_levers(candidates, {})
    found = candidates.get(levers) if levers else given
    assert found is not None
    planned = told(found.config, spec, gpu, budget_bytes, found)
    return replace(planned, levers=levers_of(candidates, levers, among=levers.keys())) if levers else planned


def fitting_levers(candidates: Candidates, base: Changes) -> dict[str, Any] | None:
    """`needed_levers`, and with what memory they leave as few checkpointed layers as fit; then shared passes, where
    streamed weights are waited for.

    With streamed layers every layer stays checkpointed: so few are streamed that nothing is left.
    """
    needed = needed_levers(candidates, base)
    if needed is None:
        return None
    return shared_passes(
        candidates, base, needed if STREAMED in needed else _with_whole_layers(candidates, base, needed)
    )


def _with_whole_layers(candidates: Candidates, base: Changes, needed: dict[str, Any]) -> dict[str, Any]:
    changes = {**base, **needed}
    found = candidates.get(changes)
    assert found is not None
    for fewer, _ in fewer_checkpointed(candidates, [(changes, found)], pinned_levers(candidates)):
        return {path: value for path, value in fewer.items() if path not in base}
    return needed


def needed_levers(candidates: Candidates, base: Changes) -> dict[str, Any] | None:
    """The values of levers left to the plan with which the variant with `base` fits; None where none suffice.

    Empty where it fits as it is. Levers are taken in the order of their planned price, and those that a later one has
    made needless are left out again. Streamed layers come last, as few as suffice.

    Raises:
        UnsupportedModel: the model can't be planned.
    """
    found = candidates.get(base)
    if found is None:
        return None
    if found.fits:
        return {}
    light = _light(candidates, base, found)
    together = _merged(light)
    chosen: dict[str, Any] | None
    if fits(candidates, {**base, **together}):
        chosen = _in_order_of_price(candidates, base, found, light)
    elif STREAMED in automatic_paths(candidates.config):
        chosen = _with_streaming(candidates, base, together)
    else:
        chosen = None
    return None if chosen is None else _without_the_needless(candidates, base, chosen)


def can_fit(candidates: Candidates, base: Changes) -> bool:
    """Whether the variant with `base` fits with every lever that is left to the plan."""
    changes = {**base, **every_lever(candidates, base)}
    if fits(candidates, changes):
        return True
    streams = STREAMED in automatic_paths(candidates.config)
    return streams and fits(candidates, {**changes, STREAMED: candidates.num_decoder_layers})


def every_lever(candidates: Candidates, base: Changes) -> dict[str, Any]:
    """Every lever but streaming that is left to the plan and that the variant with `base` allows."""
    found = candidates.get(base)
    return {} if found is None else _merged(_light(candidates, base, found))


def pinned_levers(candidates: Candidates) -> frozenset[str]:
    """Paths of the levers whose values the user gave."""
    return frozenset(f"hardware.{name}" for name in LEVER_NAMES) - automatic_paths(candidates.config)


def _light(candidates: Candidates, base: Changes, found: Candidate) -> list[Changes]:
    """Levers but streaming that are left to the plan and that the model, the method and the data allow."""
    automatic = automatic_paths(candidates.config)
    batch = found.work.batch
    num_tokens = batch.num_tokens // found.config.hardware.levers.micro_batches_per_pass  # that a layer takes at once
    options: list[tuple[Changes, bool]] = [
        ({EMBEDDING: True}, True),
        ({OFFLOAD: True}, True),
        ({FEATURES: True}, bool(batch.num_images)),
        ({TILES: TILE_TOKENS}, num_tokens > TILE_TOKENS),
    ]
    wanted = [changes for changes, has_use in options if has_use and automatic.issuperset(changes)]
    if tried(candidates, {**base, **_merged(wanted)}) is not None:
        return wanted
    return [changes for changes in wanted if tried(candidates, {**base, **changes}) is not None]


def _in_order_of_price(candidates: Candidates, base: Changes, found: Candidate, light: list[Changes]) -> dict[str, Any]:
    """As many of the `light` levers as it takes, which all together suffice."""
    chosen: dict[str, Any] = {}
    for lever in sorted(_priced(candidates, base, found, light), key=lambda each: (each.price, -each.saves_bytes)):
        chosen |= lever.changes
        if fits(candidates, {**base, **chosen}):
            break
    return chosen


def _priced(candidates: Candidates, base: Changes, found: Candidate, light: list[Changes]) -> Iterator[_Priced]:
    for changes in light:
        alone = candidates.get({**base, **changes})
        assert alone is not None
        more = 0.0 if found.time is None or alone.time is None else alone.time.step_s / found.time.step_s - 1
        yield _Priced(changes, max(round(more / EQUAL_SHARE), 0), found.device_bytes - alone.device_bytes)


def _with_streaming(candidates: Candidates, base: Changes, together: Changes) -> dict[str, Any] | None:
    """Every light lever and the fewest streamed layers that then suffice; None where even all of them don't.

    Tiles compute more; transfers run beside the computing, until they take longer. So both ways are tried.
    """
    ways = [dict(together)]
    if TILES in together:
        ways.append({path: value for path, value in together.items() if path != TILES})
    options = []
    for levers in ways:
        count = fewest_streamed(candidates, {**base, **levers})
        if count is not None:
            options.append({**levers, STREAMED: count})
    return min(options, key=lambda levers: _step_s(candidates, {**base, **levers}), default=None)


def _without_the_needless(candidates: Candidates, base: Changes, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`chosen` less what the variant fits without, the dearest first."""
    kept = dict(chosen)
    for path in reversed(list(chosen)):
        fewer = {other: value for other, value in kept.items() if other != path}
        if fits(candidates, {**base, **fewer}):
            kept = fewer
    return kept


def _merged(levers: list[Changes]) -> dict[str, Any]:
    return {path: value for lever in levers for path, value in lever.items()}


def _step_s(candidates: Candidates, changes: Changes) -> float:
    found = candidates.get(changes)
    return 0.0 if found is None or found.time is None else found.time.step_s
