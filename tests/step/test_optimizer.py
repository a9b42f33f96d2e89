"""Learning rates against torch's own schedule and closed forms; the optimizer's first step against AdamW's formula."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from eightgig.config import OptimizerName, TrainingHyperparameters
from eightgig.step.optimizer import build_optimizer, build_scheduler, learning_rate_factor

CPU = torch.device("cpu")


def _settings(**values: Any) -> TrainingHyperparameters:
    return TrainingHyperparameters.model_validate(values)


def _rates(settings: TrainingHyperparameters, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    scheduler = build_scheduler(settings, optimizer, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_without_warm_up_the_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = CosineAnnealingLR(optimizer, T_max=17)
    expected = []
    for _ in range(17):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert _rates(_settings(learning_rate=3e-4, warmup_ratio=0.0), 17) == pytest.approx(expected, rel=1e-9)


def test_warm_up_rises_in_equal_parts_to_the_full_rate() -> None:
    rates = _rates(_settings(learning_rate=1e-3, warmup_ratio=0.3, lr_schedule="constant"), 10)
    assert rates == pytest.approx([1e-3 * share for share in (0.25, 0.5, 0.75, *[1.0] * 7)])


@given(num_steps=st.integers(1, 400), warmup_ratio=st.floats(0, 0.99), schedule=st.sampled_from(["cosine", "constant"]))
def test_every_step_learns_and_none_more_than_the_full_rate(num_steps: int, warmup_ratio: float, schedule: str) -> None:
    num_warmup_steps = math.ceil(warmup_ratio * num_steps)
    factors = [
        learning_rate_factor(step, num_steps=num_steps, num_warmup_steps=num_warmup_steps, schedule=schedule)
        for step in range(num_steps)
    ]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:num_warmup_steps] == sorted(factors[:num_warmup_steps])
    assert factors[num_warmup_steps:] == sorted(factors[num_warmup_steps:], reverse=True)
    if schedule == "cosine" and num_warmup_steps < num_steps:
        after_the_last = learning_rate_factor(
            num_steps, num_steps=num_steps, num_warmup_steps=num_warmup_steps, schedule=schedule
        )
        assert after_the_last == pytest.approx(0.0)


def test_the_first_step_is_adamws() -> None:
    weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = build_optimizer(_settings(learning_rate=0.1, weight_decay=0.5), [weights], CPU)
    weights.grad = torch.tensor([3.0, -0.2, 0.01])
    optimizer.step()
    # Decoupled decay first, then lr * m̂ / (√v̂ + ε), whose first value is the gradient's sign.
    expected = [1.0 * (1 - 0.1 * 0.5) - 0.1, -2.0 * (1 - 0.1 * 0.5) + 0.1, 0.5 * (1 - 0.1 * 0.5) - 0.1]
    torch.testing.assert_close(weights.detach(), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "device", "kind"),
    [
        (OptimizerName.AUTO, "cpu", torch.optim.AdamW),
        (OptimizerName.AUTO, "cuda", bnb.optim.AdamW8bit),
        (OptimizerName.ADAMW, "cuda", torch.optim.AdamW),
        (OptimizerName.ADAMW_8BIT, "cpu", bnb.optim.AdamW8bit),
        (OptimizerName.PAGED_ADAMW_8BIT, "cuda", bnb.optim.PagedAdamW8bit),
    ],
)
def test_which_optimizer_is_used_where(name: OptimizerName, device: str, kind: type[torch.optim.Optimizer]) -> None:
    settings = _settings(optimizer=name, learning_rate=3e-4, weight_decay=0.25)
    optimizer = build_optimizer(settings, [nn.Parameter(torch.zeros(8))], torch.device(device))
    assert type(optimizer) is kind
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (3e-4, 0.25)
