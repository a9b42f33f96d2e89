"""How many micro-batches share a pass where the weights of streamed layers are waited for.

Each pass brings the weights of the streamed layers twice. With several micro-batches in it there are fewer passes; what
it takes are the rows of all of them between two layers, and so perhaps more streamed layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eightgig.config.levers import automatic_paths
from eightgig.models.host_weights import STREAMED
from eightgig.plan.candidates import Candidate, Candidates, Changes
from eightgig.plan.fewest_streamed import fewest_streamed, tried
from eightgig.plan.levers import OFFLOAD, TOGETHER
from eightgig.plan.step_time import waits_for_link

# Of a step: less than that is no gain, since planned times are no more exact (docs/reference/plan_accuracy.md).
LEAST_GAIN = 0.01


def shared_passes(candidates: Candidates, base: Changes, levers: Mapping[str, Any]) -> dict[str, Any]:
    """`levers`, with as many micro-batches a pass as make the variant with `base` fastest, where these are left to the
    plan and one alone leaves the card waiting for weights.

    Where more of them want more layers streamed, and how many is left to the plan, so many are. Layer inputs wait on
    the host, where that is left to the plan: those of all rows would lie on the card.

    Args:
        candidates: makes variants.
        base: what the levers come on top of.
        levers: with which the variant fits.
    """
    best = dict(levers)
    found = tried(candidates, {**base, **levers})
    if found is None or not _may_gain(candidates, found):
        return best
    automatic, accumulation = automatic_paths(candidates.config), found.config.training.gradient_accumulation_steps
    for count in (count for count in range(2, accumulation + 1) if accumulation % count == 0):
        changes = {**levers, TOGETHER: count}
        if OFFLOAD in automatic and found.config.hardware.gradient_checkpointing:
            changes[OFFLOAD] = True
        shared = _fitting(candidates, base, changes)
        before = tried(candidates, {**base, **best})
        if shared is None or _seconds(tried(candidates, {**base, **shared})) > (1 - LEAST_GAIN) * _seconds(before):
            break
        best = shared
    return best


def _may_gain(candidates: Candidates, found: Candidate) -> bool:
    if TOGETHER not in automatic_paths(candidates.config) or not found.config.hardware.levers.streamed_layers:
        return False
    if candidates.rates is None or not candidates.spec.family.rows_are_independent:
        return False
    return waits_for_link(found.simulation.micro_batch_costs, candidates.rates)


def _fitting(candidates: Candidates, base: Changes, changes: dict[str, Any]) -> dict[str, Any] | None:
    """`changes`, with which the variant with `base` fits, perhaps with more streamed layers; None where it does not."""
    found = tried(candidates, {**base, **changes})
    if found is None:
        return None
    if found.fits:
        return changes
    if STREAMED not in automatic_paths(candidates.config):
        return None
    count = fewest_streamed(candidates, {**base, **{path: v for path, v in changes.items() if path != STREAMED}})
    return None if count is None else {**changes, STREAMED: count}


def _seconds(found: Candidate | None) -> float:
    assert found is not None
    assert found.time is not None
    return found.time.step_s
