"""The optimizer and the learning-rate schedule that a config asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eightgig.config import OptimizerName, TrainingHyperparameters


def build_optimizer(
    training: TrainingHyperparameters, parameters: Iterable[nn.Parameter], device: torch.device
) -> Optimizer:
    """AdamW over `parameters`: with 8-bit states on CUDA and torch's own on the CPU, unless the config names one."""
    name = training.optimizer
    if name is OptimizerName.AUTO:
        name = OptimizerName.ADAMW_8BIT if device.type == "cuda" else OptimizerName.ADAMW
    learning_rate, weight_decay = training.learning_rate, training.weight_decay
    if name is OptimizerName.ADAMW:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    from bitsandbytes import optim

    eight_bit = optim.PagedAdamW8bit if name is OptimizerName.PAGED_ADAMW_8BIT else optim.AdamW8bit
    optimizer: Optimizer = eight_bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer


def learning_rate_factor(step: int, *, num_steps: int, num_warmup_steps: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) as a share of the full one.

    Warm-up rises linearly and gives the first step a rate above zero; cosine then falls to zero after the last step.
    """
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_scheduler(training: TrainingHyperparameters, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """The schedule of `training` over `num_steps` optimizer steps."""
    num_warmup_steps = math.ceil(training.warmup_ratio * num_steps)

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, num_steps=num_steps, num_warmup_steps=num_warmup_steps, schedule=training.lr_schedule
        )

    return LambdaLR(optimizer, factor)
