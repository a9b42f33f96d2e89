"""Taking an optimizer step back that memory ran out in, so that it can be done again as if it had never begun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eightgig.core.logging import get_logger
from eightgig.core.units import GIB
from eightgig.step.step import TrainingStep

# Adapters of rank 64 on a 13B model take 1.0 GB in fp32, their 8-bit states 0.5 GB. A model that learns as a whole
# would spend more time on the copies than on the step.
MAX_KEPT_BYTES = 2 * GIB

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Kept:
    """What an update may change, as it was before.

    Attributes:
        copies: each tensor that is updated in place, and its values on the host.
        states: of each parameter that has any; tensors are those of `copies`.
        groups: the optimizer's groups, without their parameters.
    """

    copies: list[tuple[Tensor, Tensor]]
    states: dict[Tensor, dict[str, Any]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None


class StepUndo:
    """Keeps weights and optimizer state on the host while a step changes them, in the same memory for each step."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self._pins = step.compute.device.type == "cuda"
        self._buffers: dict[tuple[int, str], Tensor] = {}
        self._kept: _Kept | None = None
        self._is_changing = False

    def keep(self) -> bool:
        """Keep what an update is about to change; False where it is more than MAX_KEPT_BYTES, and nothing is kept."""
        self._kept = None
        self._is_changing = False
        tensors = dict(self._tensors())
        if sum(tensor.nbytes for tensor in tensors.values()) <= MAX_KEPT_BYTES:
            optimizer, scaler = self._step.optimizer, self._step.scaler
            self._kept = _Kept(
                copies=[(tensor, self._copied(key, tensor)) for key, tensor in tensors.items()],
                states={parameter: dict(state) for parameter, state in optimizer.state.items()},
                groups=[
                    {key: value for key, value in group.items() if key != "params"} for group in _groups(optimizer)
                ],
                scheduler=self._step.scheduler.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
            )
        self._is_changing = True
        return self._kept is not None

    def forget(self) -> None:
        """The step is done and stays."""
        self._kept = None
        self._is_changing = False

    def restore(self) -> bool:
        """Be where the step began, without gradients; False where weights may have changed that were not kept."""
        step = self._step
        step.optimizer.zero_grad(set_to_none=True)
        if self._kept is None and self._is_changing:
            return False
        scaler_state = None if step.scaler is None else step.scaler.state_dict()
        if self._kept is not None:
            self._put_back(self._kept)
            scaler_state = self._kept.scaler
        if scaler_state is not None:  # anew, since a scaler unscales but once between two updates
            step.scaler = torch.amp.GradScaler(step.compute.device.type)
            step.scaler.load_state_dict(scaler_state)
        self.forget()
        return True

    def _put_back(self, kept: _Kept) -> None:
        optimizer = self._step.optimizer
        with torch.no_grad():
            for tensor, copy in kept.copies:
                tensor.copy_(copy, non_blocking=True)
        for parameter in list(optimizer.state):
            if parameter not in kept.states:
                del optimizer.state[parameter]
        for parameter, state in kept.states.items():
            optimizer.state[parameter] = dict(state)
        for group, values in zip(_groups(optimizer), kept.groups, strict=True):
            group.update(values)
        self._step.scheduler.load_state_dict(kept.scheduler)

    def _tensors(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """What an update changes in place, by parameter's number and name; a table that states share comes once."""
        seen: set[int] = set()
        for number, parameter in enumerate(self._step.trainable.values()):
            yield (number, ""), parameter.detach()
            for name, value in self._step.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield (number, name), value

    def _copied(self, key: tuple[int, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = self._buffer_like(tensor)
        return buffer.copy_(tensor, non_blocking=True)

    def _buffer_like(self, tensor: Tensor) -> Tensor:
        """Memory of the host for `tensor`, pinned where that can be had, so that the copy is quick."""
        if self._pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                logger.warning("what a step may take back lies in memory that is not pinned (%s): slower", error)
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return groups
