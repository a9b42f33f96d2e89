"""A checkpoint holds all that decides the steps to come: what goes on from it computes the same, bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eightgig.checkpoint.store import write_checkpoint
from eightgig.checkpoint.training_state import training_state
from eightgig.config import TrainingConfig
from eightgig.step.optimizer import build_optimizer, build_scheduler
from eightgig.step.step import TrainingStep
from eightgig.train.fingerprint import fingerprint_of
from eightgig.train.saving import resume_from_checkpoint

CONFIG = TrainingConfig.model_validate({"training": {"optimizer": "adamw", "max_steps": 40}})
OVERFLOWS = {2, 3, 7, 11}
"""Steps whose gradients are not finite: the scale halves, and grows again after GROWTH_INTERVAL good ones."""
GROWTH_INTERVAL = 3


def _run() -> Any:
    """A run in fp16 as far as saving knows it: one linear layer, and a loss scaler."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = build_optimizer(CONFIG.training, model.parameters(), torch.device("cpu"))
    step = TrainingStep(
        model=model,
        family=None,  # type: ignore[arg-type]  # no forward pass of a family here
        compute=None,  # type: ignore[arg-type]
        trainable=dict(model.named_parameters()),
        optimizer=optimizer,
        scheduler=build_scheduler(CONFIG.training, optimizer, 40),
        max_grad_norm=1.0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=GROWTH_INTERVAL),
    )
    return SimpleNamespace(
        model=model, step=step, trainable=step.trainable, config=CONFIG, data=SimpleNamespace(fingerprint="d", files={})
    )


def _train(run: Any, steps: range) -> list[float]:
    """The scale after each of `steps`."""
    scales = []
    for number in steps:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        loss = run.model(inputs).square().mean() * (float("inf") if number in OVERFLOWS else 1.0)
        run.step.scaler.scale(loss).backward()
        run.step.apply(run.step.finish_gradients())
        scales.append(run.step.scaler.get_scale())
    return scales


@pytest.mark.parametrize("stop", [1, 3, 5, 9])
def test_the_loss_scale_of_fp16_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    whole = _run()
    scales = _train(whole, range(16))
    changes = [after - before for before, after in pairwise(scales)]
    assert min(changes) < 0 < max(changes)  # it did move, both ways
    killed = _run()
    _train(killed, range(stop))
    path = write_checkpoint(
        tmp_path,
        step=stop,
        model=killed.model,
        state=training_state(killed.step),
        fingerprint=fingerprint_of(killed),
    )
    resumed = _run()
    with torch.no_grad():
        resumed.model.weight.add_(1.0)  # all of it is to come from the checkpoint
    assert resume_from_checkpoint(resumed, path, print) == stop
    assert _train(resumed, range(stop, 16)) == scales[stop:]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.model.bias, whole.model.bias)
