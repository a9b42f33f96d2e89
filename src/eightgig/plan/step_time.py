"""How long a planned step takes: what its operations take on the card, or the CPU's time to issue them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from eightgig.plan.card_rates import CardRates
from eightgig.plan.op_costs import (
    ATTENTION,
    ATTENTION_BACKWARD,
    BESIDE,
    MEMORY,
    PREFETCH,
    PRODUCT,
    TRANSFER,
    OpCost,
)

_ON_ITS_OWN_STREAM = {BESIDE, PREFETCH}


@dataclass(frozen=True)
class PlannedTime:
    """What a run's time is planned to be.

    Attributes:
        step_s: of one optimizer step.
        epoch_s: of all steps of an epoch, None where their number is not known.
        tokens_per_s: tokens of a step, image tokens among them, by its time.
        basis: where the card's rates come from.
    """

    step_s: float
    epoch_s: float | None
    tokens_per_s: float
    basis: str


def planned_time(
    train: Mapping[OpCost, float],
    update: Mapping[OpCost, float],
    rates: CardRates,
    *,
    num_micro_batches: float,
    num_tokens: int,
    steps_per_epoch: int | None = None,
) -> PlannedTime:
    """The time of a run whose every micro-batch costs `train` and every optimizer step `update` beside.

    The update begins when the gradients' norm is known on the CPU, so it can't hide behind the backward pass.

    Args:
        train: forward and backward pass of one micro-batch.
        update: clipping and the optimizer.
        rates: the card's.
        num_micro_batches: of an optimizer step, on this card; those that share a pass count as one; their mean where
            steps differ.
        num_tokens: of a micro-batch.
        steps_per_epoch: optimizer steps, where their number is known.
    """
    step_s = num_micro_batches * seconds(train, rates) + seconds(update, rates)
    return PlannedTime(
        step_s=step_s,
        epoch_s=None if steps_per_epoch is None else steps_per_epoch * step_s,
        tokens_per_s=num_micro_batches * num_tokens / step_s,
        basis=rates.basis,
    )


def seconds(costs: Mapping[OpCost, float], rates: CardRates) -> float:
    """The time of operations that cost `costs`, each with how often it runs.

    The longest of the card's, the CPU's, and the link's for copies which run beside both.
    """
    return max(device_seconds(costs, rates), issue_seconds(costs, rates), link_seconds(costs, rates))


def waits_for_link(costs: Mapping[OpCost, float], rates: CardRates) -> bool:
    """Whether copies which run beside all else take the longest of what costs `costs`."""
    return link_seconds(costs, rates) > max(device_seconds(costs, rates), issue_seconds(costs, rates))


def device_seconds(costs: Mapping[OpCost, float], rates: CardRates) -> float:
    """The card's time for `costs`, were it never to wait for the CPU."""
    return sum(
        count * _kernel_seconds(cost, rates) for cost, count in costs.items() if cost.kind not in _ON_ITS_OWN_STREAM
    )


def link_seconds(costs: Mapping[OpCost, float], rates: CardRates) -> float:
    """The link's time for those of `costs` that are copies on a stream of their own, were they never to wait."""
    moved_bytes = sum(count * cost.moved_bytes for cost, count in costs.items() if cost.kind in _ON_ITS_OWN_STREAM)
    return moved_bytes / rates.transfer_bytes_per_s


def issue_seconds(costs: Mapping[OpCost, float], rates: CardRates) -> float:
    """The CPU's time to issue `costs`, were it never to wait for the card."""
    return sum(costs.values()) * rates.dispatch_s


def _kernel_seconds(cost: OpCost, rates: CardRates) -> float:
    """Launches, then operands that are made ready, then the work.

    Tensor cores compute while the next operands are on their way. fp32 products of adapters, which are narrow, were
    measured to take the sum of both (benchmarks/results/step_time.json, rank 8 to 64).
    """
    started_s = cost.num_kernels * rates.kernel_s + cost.prepared_bytes / rates.bytes_per_s
    memory_s = cost.moved_bytes / rates.bytes_per_s
    if cost.kind == MEMORY:
        return started_s + memory_s
    if cost.kind == TRANSFER:
        return started_s + cost.moved_bytes / rates.transfer_bytes_per_s
    if cost.dtype in (torch.float32, torch.float64):
        return started_s + memory_s + cost.flops / rates.fp32_product_flop_per_s
    return started_s + max(memory_s, cost.flops / _flop_per_s(cost.kind, rates))


def _flop_per_s(kind: str, rates: CardRates) -> float:
    return {
        PRODUCT: rates.product_flop_per_s,
        ATTENTION: rates.attention_flop_per_s,
        ATTENTION_BACKWARD: rates.attention_backward_flop_per_s,
    }[kind]
