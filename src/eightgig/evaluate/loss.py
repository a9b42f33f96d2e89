"""Validation loss: the training step's own forward pass, without gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from eightgig.data.batch import MicroBatch
from eightgig.registry.family import ModelFamily
from eightgig.step.step import Compute, SumOverProcesses, batch_loss_sum


def validation_loss(
    model: nn.Module,
    family: ModelFamily,
    batches: Iterable[MicroBatch],
    compute: Compute,
    sum_over_processes: SumOverProcesses | None = None,
) -> float:
    """Mean -log p over all target tokens of `batches` and of other processes; leaves the mode as found."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            sums[0] += float(batch_loss_sum(model, family, batch, compute))
            sums[1] += batch.num_target_tokens
    model.train(was_training)
    if sum_over_processes is not None:
        sums = sum_over_processes(sums.to(compute.device)).cpu()
    return float(sums[0] / sums[1])
