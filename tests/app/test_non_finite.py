"""Runs whose loss or gradient is no finite number: what is skipped, what is kept for inspection, when a run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.app.listening import Listener

from eightgig.cli.entry import run_command
from eightgig.config import TrainingConfig
from eightgig.core.errors import TrainingDiverged
from eightgig.step import step as step_module
from eightgig.step.step import TrainingStep
from eightgig.train import non_finite
from eightgig.train.events import RunOutcome
from eightgig.train.non_finite import NumberWatch

MakeConfig = Callable[..., TrainingConfig]
RunTraining = Callable[..., RunOutcome]


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Any], bool], factor: float = math.nan) -> None:
    """Multiply the loss of the micro-batches that `is_bad` picks, in training alone."""
    clean = step_module.batch_loss_sum

    def poisoned(model: Any, family: Any, batch: Any, compute: Any) -> torch.Tensor:
        loss = clean(model, family, batch, compute)
        return loss * factor if model.training and is_bad(batch) else loss

    monkeypatch.setattr(step_module, "batch_loss_sum", poisoned)
    monkeypatch.setattr("eightgig.train.non_finite_dump.batch_loss_sum", poisoned)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "step"]


def test_one_bad_sample_costs_its_step_and_is_written_down(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"num_epochs": 1, "max_steps": None})
    poison(monkeypatch, lambda batch: "train-3" in batch.sample_ids)
    listener = Listener()
    outcome = run_training(config, listener=listener)
    assert outcome.status == "finished"
    steps = steps_of(outcome.run_folder)
    skipped = [record["step"] for record in steps if record["skipped"]]
    assert len(skipped) == 1
    (folder,) = (outcome.run_folder / "non_finite").iterdir()
    assert folder.name == f"step-{skipped[0]:08d}"
    (told,) = [text for text in listener.texts if "is skipped" in text]
    assert told == f"step {skipped[0]} is skipped: the loss is not a finite number; its batch is in {folder}"

    dump = json.loads((folder / "batch.json").read_text(), parse_constant=pytest.fail)
    assert (dump["step"], dump["loss"], dump["loss_scale"]) == (skipped[0], "nan", None)
    assert dump["num_non_finite_gradients"] == len(dump["non_finite_gradients"]) > 10
    assert all("lora_" in name for name in dump["non_finite_gradients"])
    ids = [sample["sample_id"] for batch in dump["micro_batches"] for sample in batch["samples"]]
    at = dump["inputs_of_micro_batch"]
    assert ids[at] == "train-3"
    assert [batch["loss"] == "nan" for batch in dump["micro_batches"]] == [index == at for index in range(len(ids))]
    (sample,) = dump["micro_batches"][at]["samples"]
    assert sample["source"].endswith("train.jsonl:4")
    image, question = sample["messages"][0]["parts"]
    assert image["image"].endswith("train-3.png")
    assert len(image["sha256"]) == 64
    assert question == "What is the colour of bar 3?"
    inputs = load_file(folder / "inputs.safetensors")
    assert {name: list(value.shape) for name, value in inputs.items() if name != "labels"} == (
        dump["micro_batches"][at]["shapes"]
    )
    assert "pixel_values" in inputs


def test_skipping_leaves_the_run_as_if_the_step_had_learnt_nothing(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An independent reference: the same run with the update of that step left out by hand."""
    config = tiny_config()
    bad_step = 3
    counter = SimpleNamespace(now=0)
    call = TrainingStep.__call__

    def counted(self: TrainingStep, batches: Any, num: int) -> Any:
        counter.now += 1
        return call(self, batches, num)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    with monkeypatch.context() as patched:
        poison(patched, lambda batch: counter.now == bad_step, math.inf)
        skipped = run_training(config, name="skipped")
    counter.now = 0
    apply = TrainingStep.apply

    def left_out(self: TrainingStep, grad_norm: float) -> bool:
        if counter.now != bad_step:
            return apply(self, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return False

    monkeypatch.setattr(TrainingStep, "apply", left_out)
    reference = run_training(config, name="reference")
    expected, found = (
        load_file(run.run_folder / "adapter" / "adapter_model.safetensors") for run in (reference, skipped)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    later = [[record["loss"] for record in steps_of(run.run_folder)[bad_step:]] for run in (reference, skipped)]
    assert later[0] == later[1]


def test_steps_in_a_row_end_the_run_at_the_last_good_checkpoint(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(
        training={"max_skipped_steps": 3, "max_steps": 12},
        validation={"every_steps": None},
        hardware={"rehearsal": False},  # so that each call is a step
    )
    counter = SimpleNamespace(now=0)
    call = TrainingStep.__call__

    def counted(self: TrainingStep, batches: Any, num: int) -> Any:
        counter.now += 1
        return call(self, batches, num)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    # Two in a row and a good one do not end it; the fifth to the seventh do.
    poison(monkeypatch, lambda batch: counter.now in (2, 3, 5, 6, 7))
    with pytest.raises(TrainingDiverged) as caught:
        run_training(config)
    run = tmp_path / "run"
    assert [record["step"] for record in steps_of(run) if record["skipped"]] == [2, 3, 5, 6, 7]
    error = caught.value
    assert "no finite loss and gradient in 3 steps in a row, up to step 7" in error.found
    assert "the learning rate 0.005 is too high" in error.found
    assert "bad sample" not in error.found  # every micro-batch of every step had it
    assert "step-00000006, whose adapter/ loads as it is" in error.expected
    assert str(run / "non_finite") in error.next_step
    assert len(list((run / "non_finite").iterdir())) == 5
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "failed"
    # What the checkpoint holds is what the last good step left: step 4's weights.
    weights = [
        load_file(run / "checkpoints" / f"step-0000000{step}" / "adapter" / "adapter_model.safetensors")
        for step in (4, 6)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_sample_that_is_in_every_bad_step_is_named(
    tiny_config: MakeConfig, run_training: RunTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(training={"max_skipped_steps": 1})
    poison(monkeypatch, lambda batch: "train-3" in batch.sample_ids)
    with pytest.raises(TrainingDiverged, match="in a step, up to step") as caught:
        run_training(config)
    assert "a bad sample: train-3 was in every one of these steps" in caught.value.found


def test_the_command_ends_with_a_code_of_its_own(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(training={"max_skipped_steps": 1}, validation={"every_steps": None})
    (tmp_path / "a.json").write_text(config.model_dump_json())
    poison(monkeypatch, lambda batch: True)
    assert run_command(["train", "a.json", "--run-folder", "run"]) == 8
    err = capsys.readouterr().err
    assert "error: no finite loss and gradient in a step, up to step 1" in err
    assert "none: no checkpoint was due yet" in err
    assert "Traceback" not in err


class _Folder(SimpleNamespace):
    """Stands in for a journal."""

    def message(self, text: str) -> None:
        self.texts.append(text)


def _watch(scaler: torch.amp.GradScaler | None, monkeypatch: pytest.MonkeyPatch) -> tuple[NumberWatch, _Folder]:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, math.inf])
    compute = SimpleNamespace(input_dtype=torch.float16, autocast_dtype=None)
    step = SimpleNamespace(scaler=scaler, trainable={"a": parameter}, compute=compute)
    training = SimpleNamespace(max_skipped_steps=3, learning_rate=1e-4)
    run: Any = SimpleNamespace(step=step, trainable=step.trainable, config=SimpleNamespace(training=training))
    journal: Any = _Folder(texts=[], folder=SimpleNamespace(non_finite=Path("x"), checkpoints=Path("gone")))
    monkeypatch.setattr(
        non_finite,
        "write_dump",
        lambda *_: SimpleNamespace(folder="x", num_micro_batches=1, num_non_finite_losses=0, blamed_sample_ids=()),
    )
    return NumberWatch(run, journal), journal


def test_the_first_overflows_of_fp16_are_no_alarm_and_endless_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's first scale is 65,536. Sixteen halvings are the scaler's search; what overflows at 1 is the model."""
    scaler = torch.amp.GradScaler("cpu")
    watch, journal = _watch(scaler, monkeypatch)
    quiet = 0

    def one_step(step: int) -> None:
        nonlocal quiet
        seen = watch.look(2.0, math.inf)
        assert seen.non_finite_gradients == ("a",)
        quiet += seen.is_overflow
        watch.judge(step, [])
        scaler._scale = torch.tensor(scaler.get_scale() / 2)  # as `update` does

    for step in range(1, 19):
        one_step(step)
    with pytest.raises(TrainingDiverged) as caught:
        one_step(19)
    assert quiet == 16
    assert len(journal.texts) == 3
    assert "up to step 19" in caught.value.found
    assert "fp16 holds nothing above 65,504" in caught.value.found


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, journal = _watch(torch.amp.GradScaler("cpu"), monkeypatch)
    watch.look(math.inf, math.inf)
    watch.judge(1, [])
    assert len(journal.texts) == 1


def test_a_spike_is_told_with_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, journal = _watch(None, monkeypatch)
    batches: Any = [SimpleNamespace(sample_ids=(f"s{index}",)) for index in range(6)]
    for step in range(1, 31):
        assert not watch.look(1.0, 2.0).is_spike
        watch.judge(step, batches)
    for _ in range(50):  # a step that is begun anew counts once
        assert watch.look(1.0, 30.0).is_spike
    watch.judge(31, batches)
    assert journal.texts == [
        "step 31: the gradient norm 30 is 15.0 times the usual 2; its samples were s0, s1, s2, s3 and 2 more"
    ]
