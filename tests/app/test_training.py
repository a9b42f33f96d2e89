"""Whole runs on the tiny model: methods told apart, equal however the batch is cut, results that load elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eightgig.app.prediction import predict
from eightgig.config import TrainingConfig, save_config
from eightgig.core.errors import EnvironmentProblem
from eightgig.train.events import RunOutcome, RunStart, SilentListener

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]


def _records(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in _records(run_folder, "step")]


class _Recorder(SilentListener):
    def __init__(self) -> None:
        self.starts: list[RunStart] = []
        self.messages: list[str] = []

    def on_start(self, start: RunStart) -> None:
        self.starts.append(start)

    def on_message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize(
    ("training", "method", "is_4bit", "result"),
    [
        ({}, "qlora", True, "adapter/adapter_model.safetensors"),
        ({"quantization": {"load_in_4bit": False}}, "lora", False, "adapter/adapter_model.safetensors"),
        ({"quantization": {"load_in_4bit": False}, "lora": None}, "full", False, "model/model.safetensors"),
    ],
    ids=["qlora", "lora", "full"],
)
def test_each_method_trains_and_its_result_loads_in_a_fresh_process(
    tiny_config: Config, run_training: Train, training: dict[str, Any], method: str, is_4bit: bool, result: str
) -> None:
    listener = _Recorder()
    config = tiny_config(training=training | {"learning_rate": 2e-3, "max_steps": 5})
    outcome = run_training(config, listener=listener, is_proved=True)

    assert listener.starts[0].method == method
    assert any(row["is_4bit"] for row in listener.starts[0].receipt_rows) is is_4bit
    assert (outcome.run_folder / result).is_file()
    assert outcome.verification is not None
    assert outcome.verification["ok"]
    assert outcome.verification["relative_difference"] <= 1e-5
    losses = _losses(outcome.run_folder)
    assert losses[-1] < losses[0]
    report = (outcome.run_folder / "report.html").read_text()
    assert f"{losses[-1]:.3g}"[:3] in report


def test_samples_past_a_model_s_positions_train_and_are_told_of(
    tiny_config: Config, run_training: Train, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "short"))
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["max_position_embeddings"] = 20
    (folder / "config.json").write_text(json.dumps(values))
    listener = _Recorder()
    outcome = run_training(tiny_config(model={"name": str(folder)}, training={"max_steps": 2}), listener=listener)
    assert len(_losses(outcome.run_folder)) == 2
    assert sum("longer than the 20 tokens that" in message for message in listener.messages) == 1
    silent = _Recorder()
    run_training(tiny_config(training={"max_steps": 2}), name="long", listener=silent)
    assert not any("longer than the" in message for message in silent.messages)


def test_one_times_four_is_four_times_one(tiny_config: Config, run_training: Train) -> None:
    by_cut = {}
    for batch_size, accumulation in ((1, 4), (4, 1), (2, 2)):
        config = tiny_config(training={"batch_size": batch_size, "gradient_accumulation_steps": accumulation})
        outcome = run_training(config, name=f"run-{batch_size}")
        by_cut[batch_size] = (
            _losses(outcome.run_folder),
            load_file(outcome.run_folder / "adapter" / "adapter_model.safetensors"),
        )
    losses, weights = by_cut[1]
    for other_losses, other_weights in (by_cut[4], by_cut[2]):
        assert other_losses == pytest.approx(losses, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_data_workers_change_nothing(tiny_config: Config, run_training: Train, start_method: str) -> None:
    config = tiny_config(training={"max_steps": 2})
    alone = run_training(config, name="alone")
    with_workers = tiny_config(training={"max_steps": 2}, data={"num_workers": 2, "worker_start_method": start_method})
    outcome = run_training(with_workers, name="workers")
    assert _losses(outcome.run_folder) == _losses(alone.run_folder)


def test_two_processes_give_the_losses_of_one(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    config = tiny_config(training={"max_steps": 4})
    alone = run_training(config, name="alone")

    save_config(config, tmp_path / "config.json")
    # --multi_gpu makes accelerate start several processes on one machine; the config keeps them on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    process = subprocess.run(
        [*launch, "-m", "eightgig", "train", str(tmp_path / "config.json"), "--run-folder", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["num_processes"] == 2
    assert _losses(tmp_path / "two") == pytest.approx(_losses(alone.run_folder), rel=1e-5)
    validations = [record["loss"] for record in _records(tmp_path / "two", "validation")]
    assert validations == pytest.approx(
        [record["loss"] for record in _records(alone.run_folder, "validation")], rel=1e-5
    )


def test_a_dry_run_stops_before_the_first_step(tiny_config: Config, run_training: Train) -> None:
    listener = _Recorder()
    outcome = run_training(tiny_config(), listener=listener, dry_run=True)
    assert outcome.status == "dry run"
    assert len(listener.starts) == 1
    assert (outcome.run_folder / "receipt.json").is_file()
    assert not (outcome.run_folder / "metrics.jsonl").exists()
    assert not (outcome.run_folder / "adapter").exists()


def test_the_learning_rate_warms_up_and_falls_to_nearly_zero(tiny_config: Config, run_training: Train) -> None:
    outcome = run_training(tiny_config(training={"warmup_ratio": 0.34, "max_steps": 6}))
    rates = [record["learning_rate"] for record in _records(outcome.run_folder, "step")]
    # Three warm-up steps (0.34 of 6, rounded up) at 1/4, 2/4 and 3/4, then half a cosine over the other three.
    assert rates == pytest.approx([5e-3 * share for share in (0.25, 0.5, 0.75, 1.0, 0.75, 0.25)])


def test_an_existing_run_folder_is_never_written_over(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="exists already and is not empty"):
        run_training(tiny_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_a_failed_run_says_so_in_its_folder(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    class Failing(SilentListener):
        def on_step(self, record: Any) -> None:
            raise RuntimeError("lights out")

    with pytest.raises(RuntimeError):
        run_training(tiny_config(), listener=Failing())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["reason"] == "lights out"


def test_what_was_trained_answers(tiny_config: Config, run_training: Train, tiny_data: Path) -> None:
    outcome = run_training(tiny_config(training={"max_steps": 2}))
    generations = (outcome.run_folder / "generations.jsonl").read_text().splitlines()
    last = json.loads(generations[-1])
    prediction = predict(
        question=last["question"], images=[Path(last["images"][0])], run=outcome.run_folder, max_new_tokens=4
    )
    assert prediction.answer == last["answer"]
    assert prediction.adapter == outcome.run_folder / "adapter"
