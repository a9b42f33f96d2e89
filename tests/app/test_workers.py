"""Whole runs whose data workers die or hang: they end as if nothing had been, or cleanly and with a message."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.app.listening import Listener

from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import EnvironmentProblem
from eightgig.data import loader
from eightgig.train.events import RunOutcome

MakeConfig = Callable[..., TrainingConfig]
RunTraining = Callable[..., RunOutcome]


def kill_workers(
    monkeypatch: pytest.MonkeyPatch, marks: Path, is_due: Callable[[str], bool], *, times: int = 1_000_000
) -> None:
    """Have worker processes killed the first `times` times that a sample's id `is_due`; forked ones inherit this."""
    encoded, parent = loader._encoded, os.getpid()

    def killed(encoder: Any, sample: Any) -> Any:
        if os.getpid() != parent and is_due(sample.sample_id):
            num_before = len(list(marks.glob("died-*")))
            if num_before < times:
                (marks / f"died-{num_before}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return encoded(encoder, sample)

    monkeypatch.setattr(loader, "_encoded", killed)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_killed_worker_changes_neither_order_nor_weights(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(
        training={"lora": {"rank": 4, "dropout": 0.2}}, data={"num_workers": 2, "worker_start_method": "fork"}
    )
    whole = run_training(config, name="whole")
    kill_workers(monkeypatch, tmp_path, lambda sample_id: sample_id == "train-5", times=2)
    broken = run_training(config, name="broken", listener=Listener())
    assert len(list(tmp_path.glob("died-*"))) == 2
    expected, found = weights(whole.run_folder), weights(broken.run_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_workers_that_die_again_and_again_end_the_run_which_can_go_on(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(
        training={"max_steps": 4},
        data={"num_workers": 2, "worker_start_method": "fork"},
        checkpoints={"every_steps": 1},
    )
    whole = run_training(config, name="whole")
    with monkeypatch.context() as patched:
        first = tmp_path / "broken" / "checkpoints" / "step-00000001"
        kill_workers(patched, tmp_path, lambda _: first.exists())
        with pytest.raises(EnvironmentProblem, match=r"waited for train-\d+ \(.*train\.jsonl:\d+\)") as caught:
            run_training(config, name="broken")
    assert caught.value.exit_code == 6
    assert "eightgig train --resume" in caught.value.next_step
    assert json.loads((tmp_path / "broken" / "run.json").read_text())["status"] == "failed"
    assert multiprocessing.active_children() == []
    resume(tmp_path / "broken", listener=Listener(), command="test")
    expected, found = weights(whole.run_folder), weights(tmp_path / "broken")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
