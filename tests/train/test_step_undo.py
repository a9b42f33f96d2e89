"""An update taken back leaves nothing of itself: weights, states, rates and the loss scale."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from eightgig.config import TrainingConfig
from eightgig.step.optimizer import build_optimizer, build_scheduler
from eightgig.step.step import Compute, TrainingStep
from eightgig.train import step_undo
from eightgig.train.step_undo import StepUndo

CPU = torch.device("cpu")


def _step(*, dtype: torch.dtype = torch.float32, has_scaler: bool = False) -> TrainingStep:
    torch.manual_seed(0)
    trainable = {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in {"a": (7, 3), "b": ()}.items()}
    training = TrainingConfig.model_validate({"training": {"warmup_ratio": 0.5, "weight_decay": 0.1}}).training
    optimizer = build_optimizer(training, trainable.values(), CPU)
    family: Any = None  # no forward pass here
    return TrainingStep(
        model=nn.Module(),
        family=family,
        compute=Compute(CPU, dtype, None, loss_chunk_tokens=1),
        trainable=trainable,
        optimizer=optimizer,
        scheduler=build_scheduler(training, optimizer, 10),
        max_grad_norm=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if has_scaler else None,
    )


def _update(step: TrainingStep, seed: int, *, value: float = 1.0) -> None:
    torch.manual_seed(seed)
    for weight in step.trainable.values():
        gradient = value * torch.randn_like(weight)
        weight.grad = gradient if step.scaler is None else step.scaler.scale(gradient)
    step.apply(step.finish_gradients())


def _state(step: TrainingStep) -> Any:
    """A copy of all that an update changes."""
    scaler = None if step.scaler is None else step.scaler.state_dict()
    weights = {name: weight.detach() for name, weight in step.trainable.items()}
    return copy.deepcopy((weights, step.optimizer.state_dict(), step.scheduler.state_dict(), scaler))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for key in value for item in (key, *_flat(value[key]))]
    if isinstance(value, list | tuple):
        return [item for each in value for item in _flat(each)]
    return value.tolist() if isinstance(value, torch.Tensor) and value.dim() else [value]


@pytest.mark.parametrize("has_scaler", [False, True])
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_an_update_is_taken_back_and_done_again(num_before: int, has_scaler: bool) -> None:
    step, other = _step(has_scaler=has_scaler), _step(has_scaler=has_scaler)
    for seed in range(num_before):
        _update(step, seed)
        _update(other, seed)
    before = _flat(_state(step))
    undo = StepUndo(step)
    for seed in (77, 78):  # in the same buffers
        assert undo.keep()
        _update(step, seed, value=float("inf") if has_scaler and seed == 78 else 1.0)
        assert _flat(_state(step)) != before
        assert undo.restore()
        assert _flat(_state(step)) == before
    _update(step, num_before)
    _update(other, num_before)
    assert _flat(_state(step)) == _flat(_state(other))


def test_gradients_that_were_unscaled_can_be_scaled_anew() -> None:
    """A scaler refuses to unscale twice; a repeated step does so."""
    step, other = _step(has_scaler=True), _step(has_scaler=True)
    assert step.scaler is not None
    for weight in step.trainable.values():
        weight.grad = step.scaler.scale(torch.ones_like(weight))
    step.finish_gradients()
    assert StepUndo(step).restore()
    assert all(weight.grad is None for weight in step.trainable.values())
    _update(step, 0)
    _update(other, 0)
    assert _flat(_state(step)) == _flat(_state(other))


def test_what_is_too_large_is_not_kept_and_not_taken_for_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step()
    _update(step, 0)
    num_bytes = sum(weight.nbytes for weight in step.trainable.values()) + sum(
        value.nbytes for state in step.optimizer.state.values() for value in state.values()
    )
    undo = StepUndo(step)
    monkeypatch.setattr(step_undo, "MAX_KEPT_BYTES", num_bytes)
    assert undo.keep()
    monkeypatch.setattr(step_undo, "MAX_KEPT_BYTES", num_bytes - 1)
    assert not undo.keep()
    assert not undo.restore()
    undo.forget()  # the update went through
    assert undo.restore()


def test_a_copy_that_fails_leaves_nothing_to_go_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step()
    undo = StepUndo(step)
    undo.keep()
    undo.forget()
    _update(step, 0)
    before = _flat(_state(step))

    def fails(key: object, tensor: object) -> None:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(undo, "_copied", fails)
    with pytest.raises(torch.OutOfMemoryError):
        undo.keep()
    assert undo.restore()
    assert _flat(_state(step)) == before
