"""One optimizer step over accumulated micro-batches. Free of logging and files: `train` owns those."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from eightgig.data.batch import MicroBatch
from eightgig.memory.packed_attention import LENGTHS
from eightgig.registry.family import ModelFamily
from eightgig.step.loss import Targets, target_loss_sum

SumOverProcesses = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Compute:
    """Where and how a forward pass runs.

    Attributes:
        device: the device of the model.
        input_dtype: dtype of floating-point model inputs (pixel values).
        autocast_dtype: dtype of autocast, None where the weights already have the compute dtype.
        loss_chunk_tokens: target positions whose logits exist at one time.
    """

    device: torch.device
    input_dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    loss_chunk_tokens: int

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast context of a forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)


def batch_loss_sum(model: nn.Module, family: ModelFamily, batch: MicroBatch, compute: Compute) -> Tensor:
    """Sum of -log p over the target tokens of `batch`, an fp32 scalar; the forward pass of training and validation."""
    targets = Targets.from_labels(batch.labels).to(compute.device)
    if batch.segment_lengths:  # on the host: the model's own rules for positions read values
        inputs = family.packed_inputs(model, batch.model_inputs, batch.segment_lengths)
        batch = replace(batch, model_inputs=inputs)
    moved = batch.to(compute.device, compute.input_dtype)
    apart = {LENGTHS: batch.segment_lengths} if batch.segment_lengths else {}
    with compute.autocast():
        hidden = family.hidden_states(model, {**moved.model_inputs, **apart})
        return target_loss_sum(
            hidden,
            targets,
            lambda states: family.logits(model, states),
            chunk_tokens=compute.loss_chunk_tokens,
        )


@dataclass(frozen=True)
class StepResult:
    """What forward and backward of one step gave.

    Attributes:
        loss: mean -log p over all target tokens of the step, over all processes; fp32 scalar on the model's device.
    """

    loss: Tensor


@dataclass
class TrainingStep:
    """Forward, backward and update of one optimizer step.

    Attributes:
        trainable: every parameter that learns, by its full name.
        scaler: loss scaling for fp16, None in every other precision.
        sum_over_processes: adds a tensor up over all processes; None when there is one.
    """

    model: nn.Module
    family: ModelFamily
    compute: Compute
    trainable: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    scheduler: LRScheduler
    max_grad_norm: float
    scaler: torch.amp.GradScaler | None = None
    sum_over_processes: SumOverProcesses | None = None

    def __call__(self, micro_batches: Iterable[MicroBatch], num_target_tokens_total: int) -> StepResult:
        """Accumulate the gradient of the mean loss over `num_target_tokens_total` tokens (those of all processes).

        Dividing by the tokens of the whole step, not batch by batch, makes 1 × 32 equal to 32 × 1: a mean of means
        would weigh the tokens of short answers more.
        """
        self.model.train()
        total = torch.zeros((), device=self.compute.device)
        for batch in micro_batches:
            loss = batch_loss_sum(self.model, self.family, batch, self.compute) / num_target_tokens_total
            torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
            total = total + loss.detach()
        if self.sum_over_processes is not None:
            total = self.sum_over_processes(total)
        return StepResult(total)

    def finish_gradients(self) -> float:
        """Sum the gradients over processes, unscale and clip them; returns their L2 norm before clipping.

        Where that is not finite they stay as they are: clipping would spread NaN from one tensor to all of them, and
        which one it came from could not be told any more.
        """
        parameters = list(self.trainable.values())
        if self.sum_over_processes is not None:
            self._reduce_gradients(parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        grad_norm = float(norm)
        if math.isfinite(grad_norm):
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return grad_norm

    def apply(self, grad_norm: float) -> bool:
        """Apply the optimizer to finished gradients and advance the schedule.

        Returns False where `grad_norm` is not finite, so that neither a parameter nor the optimizer's state moved. Such
        a step still counts in the schedule: the step number, not the history, decides the learning rate.
        """
        is_applied = math.isfinite(grad_norm)
        if is_applied and self.scaler is not None:
            self.scaler.step(self.optimizer)
        elif is_applied:
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()  # also of a step that is skipped: it halves the scale where gradients overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return is_applied

    def _reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Add up gradients in one flat buffer: adapters are small, and one call beats hundreds."""
        assert self.sum_over_processes is not None
        for parameter in parameters:
            if parameter.grad is None:  # this process had no micro-batch that reaches it
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
