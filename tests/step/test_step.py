"""Accumulation by tokens: however a batch is cut into micro-batches, the step is the same."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from eightgig.data.batch import IGNORE_INDEX, MicroBatch
from eightgig.step.step import Compute, TrainingStep

VOCAB = 29


class _Family:
    """A backbone of one embedding and one linear layer, enough to have a hidden state per token."""

    def hidden_states(self, model: Any, inputs: Any) -> torch.Tensor:
        return model.body(model.embedding(inputs["input_ids"]))

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.head(hidden)


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(VOCAB, 16)
    model.body = nn.Linear(16, 16)
    model.head = nn.Linear(16, VOCAB)
    return model


def _rows(num_rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(num_rows):
        ids = torch.randint(0, VOCAB, (11,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index] = IGNORE_INDEX  # rows with very different numbers of targets
        rows.append((ids, labels))
    return rows


def _batch(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> MicroBatch:
    labels = torch.stack([row[1] for row in rows])
    num_targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    ids = torch.stack([row[0] for row in rows])
    return MicroBatch({"input_ids": ids}, labels, num_targets, ids.numel(), 0, tuple("x" for _ in rows))


def _step(model: nn.Module, **changes: Any) -> TrainingStep:
    trainable = dict(model.named_parameters())
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    arguments: dict[str, Any] = {
        "model": model,
        "family": _Family(),
        "compute": Compute(torch.device("cpu"), torch.float32, None, loss_chunk_tokens=4),
        "trainable": trainable,
        "optimizer": optimizer,
        "scheduler": LambdaLR(optimizer, lambda _: 1.0),
        "max_grad_norm": 1e9,
    }
    return TrainingStep(**(arguments | changes))


def _train_once(sizes: list[int]) -> tuple[float, nn.Module]:
    model = _model()
    rows = _rows(sum(sizes))
    batches, start = [], 0
    for size in sizes:
        batches.append(_batch(rows[start : start + size]))
        start += size
    step = _step(model)
    result = step(batches, sum(batch.num_target_tokens for batch in batches))
    step.apply(step.finish_gradients())
    return float(result.loss), model


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [3, 5], [7, 1]])
def test_any_cut_into_micro_batches_gives_the_step_of_one_batch(sizes: list[int]) -> None:
    whole_loss, whole = _train_once([8])
    loss, model = _train_once(sizes)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_all_target_tokens() -> None:
    rows = _rows(4)
    model = _model()
    losses = []
    for ids, labels in rows:
        logits = model.head(model.body(model.embedding(ids)))[:-1]
        kept = labels[1:] != IGNORE_INDEX
        losses.append(nn.functional.cross_entropy(logits[kept], labels[1:][kept], reduction="none"))
    expected = torch.cat(losses).mean()
    loss, _ = _train_once([1, 1, 1, 1])
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    model = _model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = _step(model, max_grad_norm=0.01)
    batch = _batch(_rows(3))
    step([batch], batch.num_target_tokens)
    grad_norm = step.finish_gradients()
    assert step.apply(grad_norm)
    moved = math.sqrt(sum(float((p - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True)))
    assert grad_norm > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_told() -> None:
    model = _model()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    before = model.body.weight.detach().clone()
    step = _step(model)
    batch = _batch(_rows(2))
    step([batch], batch.num_target_tokens)
    assert not step.apply(step.finish_gradients())
    assert torch.equal(model.body.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_scaling_gives_the_unscaled_step() -> None:
    plain, scaled = _model(), _model()
    batch = _batch(_rows(4))
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=2.0**12))):
        step = _step(model, scaler=scaler)
        step([batch], batch.num_target_tokens)
        step.apply(step.finish_gradients())
    for found, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_and_loss_are_summed_over_processes() -> None:
    # A second process whose tensors equal ours: every sum doubles, so half the share each gives the whole.
    whole_loss, whole = _train_once([4])
    model = _model()
    batch = _batch(_rows(4))
    step = _step(model, sum_over_processes=lambda tensor: tensor * 2)
    result = step([batch], batch.num_target_tokens * 2)
    step.apply(step.finish_gradients())
    assert float(result.loss) == pytest.approx(whole_loss, rel=1e-6)
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_process_without_a_gradient_for_a_parameter_still_joins_the_sum() -> None:
    model = _model()
    seen = SimpleNamespace(numel=0)

    def record(tensor: torch.Tensor) -> torch.Tensor:
        seen.numel = max(seen.numel, tensor.numel())
        return tensor

    step = _step(model, sum_over_processes=record)
    step([], 1)  # no micro-batch for this process
    step.apply(step.finish_gradients())
    assert seen.numel == sum(parameter.numel() for parameter in model.parameters())


def _state(step: TrainingStep) -> dict[str, torch.Tensor]:
    """All that an update changes, copied."""
    state = {name: parameter.detach().clone() for name, parameter in step.trainable.items()}
    for number, entry in enumerate(step.optimizer.state.values()):
        state |= {f"{number}.{key}": torch.as_tensor(value).clone() for key, value in entry.items()}
    return state


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_step_that_is_skipped_leaves_weights_and_adams_state_as_they_were(bad: float, is_scaled: bool) -> None:
    """3e38: finite, but the norm of two such numbers is not; clipping by it would have Adam step by its momentum."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4) if is_scaled else None
    step = _step(model, optimizer=optimizer, scheduler=LambdaLR(optimizer, lambda _: 1.0), scaler=scaler)
    batch = _batch(_rows(4))
    step([batch], batch.num_target_tokens)
    assert step.apply(step.finish_gradients())
    before = _state(step)
    assert len(before) == 5 * 4  # weight, step and two moments of each parameter

    step([batch], batch.num_target_tokens)
    factor = 1.0 if scaler is None else scaler.get_scale()
    gradient = model.head.weight.grad
    assert gradient is not None
    gradient[0, :2] = bad
    model.body.bias.grad = torch.ones(16) * factor
    grad_norm = step.finish_gradients()
    assert not math.isfinite(grad_norm) or (is_scaled and bad == 3e38)  # unscaled, 3e38 / 16 has a finite norm
    if math.isfinite(grad_norm):
        grad_norm = math.nan  # as the loop has it where the loss is not finite
    else:
        assert torch.equal(model.body.bias.grad, torch.ones(16))  # no NaN spread to it
    assert not step.apply(grad_norm)
    after = _state(step)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    if scaler is not None:
        assert scaler.get_scale() == (2.0**3 if bad != 3e38 else 2.0**4)  # halved where a gradient overflowed

    step([batch], batch.num_target_tokens)  # and the next step is as if nothing had been
    assert step.apply(step.finish_gradients())
    assert {name for name, value in _state(step).items() if not torch.equal(value, before[name])} == set(before)


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.7, 1e9])
def test_norm_and_clipping_are_those_of_clip_grad_norm(max_grad_norm: float) -> None:
    model, twin = _model(), _model()
    batch = _batch(_rows(5))
    for each in (model, twin):
        _step(each)([batch], batch.num_target_tokens)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
    assert _step(model, max_grad_norm=max_grad_norm).finish_gradients() == float(expected)
    for found, reference in zip(model.parameters(), twin.parameters(), strict=True):
        assert found.grad is not None
        assert reference.grad is not None
        assert torch.equal(found.grad, reference.grad)
