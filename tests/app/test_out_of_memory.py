"""Whole runs that run out of memory, in each phase; and what is rehearsed before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.app.listening import Listener
from tests.train.injected_memory import FullAt

from eightgig.app import training
from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import DoesNotFit
from eightgig.train.events import RunOutcome
from eightgig.train.loop import TrainingLoop
from eightgig.train.recovery import read_switches
from eightgig.train.rehearsal import Rehearsal
from eightgig.train.run_folder import RunFolder
from eightgig.train.saving import Saver
from eightgig.train.validation import Validator

UNTIMED = ("kind", "step", "loss", "learning_rate", "grad_norm", "num_target_tokens", "exact_match", "change")
DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}  # every generator's state matters


class Failures:
    """Has methods run out of memory at operation `at` of chosen calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.num_calls: dict[str, int] = {}

    def add(self, kind: type, method: str, calls: tuple[int, ...], at: int = 40) -> None:
        """Fail the `calls` (from 0) of `method`, counted over the test."""
        name, original = f"{kind.__name__}.{method}", getattr(kind, method)

        def failing(*args: Any, **kwargs: Any) -> Any:
            call = self.num_calls.get(name, 0)
            self.num_calls[name] = call + 1
            with FullAt(at if call in calls else None):
                return original(*args, **kwargs)

        self._monkeypatch.setattr(kind, method, failing)


def _numbers(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without times and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in UNTIMED} for line in lines]


def _assert_same_end(found: Path, expected: Path) -> None:
    assert _numbers(found) == _numbers(expected)
    weights, wanted = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (found, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_rehearsal_changes_nothing_but_the_time_of_mistakes(
    tiny_config: Callable[..., TrainingConfig], run_training: Callable[..., RunOutcome]
) -> None:
    listener = Listener()
    with_it = run_training(tiny_config(training=DROPOUT | {"max_steps": 3}), name="with", listener=listener)
    config = tiny_config(training=DROPOUT | {"max_steps": 3}, hardware={"rehearsal": False})
    without = run_training(config, name="without")
    _assert_same_end(with_it.run_folder, without.run_folder)
    assert any(text.startswith("rehearsed in ") for text in listener.texts)
    memory = [json.loads((run.run_folder / "memory.json").read_text())["phases"] for run in (with_it, without)]
    assert set(memory[0]) - set(memory[1]) == {"rehearse"}
    assert not list(with_it.run_folder.glob(".rehearsal*"))


def test_out_of_memory_in_every_phase_and_over_a_resume(
    tiny_config: Callable[..., TrainingConfig],
    run_training: Callable[..., RunOutcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found levers give, bit for bit, what told ones give; an interruption between makes no difference."""
    config = tiny_config(
        training=DROPOUT | {"batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 6, "loss_chunk_tokens": 64},
        hardware={"gradient_checkpointing": False},
        validation={"every_steps": 2},
    )
    with monkeypatch.context() as patch:
        failures = Failures(patch)
        failures.add(Rehearsal, "_train", (0, 1))  # a plain second try, then checkpointing
        failures.add(Saver, "rehearse", (0,))  # a plain second try
        failures.add(TrainingLoop, "_attempt", (4, 5), at=400)  # step 5: a plain second try, then offloading
        failures.add(Validator, "__call__", (1, 2))  # after step 2: a plain second try, then two samples at once
        failures.add(Saver, "_write", (2,), at=0)  # the checkpoint after step 2, behind two rehearsals
        listener = Listener(stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, name="found", listener=listener)
    folder = RunFolder(tmp_path / "found")
    switches = read_switches(folder)
    assert [(str(switch.unit), switch.change) for switch in switches] == [
        ("the rehearsal of the largest micro-batch", "all layers are checkpointed"),
        ("the validation after step 2", "2 samples go through at a time"),
        ("step 5", "layer inputs wait on the host"),
    ]
    assert any("the checkpoint after step 2 again" in text for text in listener.texts)

    outcome = resume(folder.path, listener=Listener(), command="test")  # goes on from step 4, before the last switch
    assert outcome.status == "finished"

    monkeypatch.setattr(training, "read_switches", lambda folder: switches)
    told = run_training(config, name="told")
    _assert_same_end(folder.path, told.run_folder)


def test_a_run_that_cannot_be_helped_ends_in_its_rehearsal_and_leaves_nothing(
    tiny_config: Callable[..., TrainingConfig],
    run_training: Callable[..., RunOutcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Failures(monkeypatch).add(Rehearsal, "_train", tuple(range(20)))
    with pytest.raises(DoesNotFit, match="ran out of memory in the rehearsal of the largest micro-batch") as caught:
        run_training(tiny_config())
    assert "layer inputs wait on the host" in str(caught.value)
    assert not (tmp_path / "run").exists()
