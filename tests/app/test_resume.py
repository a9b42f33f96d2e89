"""A run killed after any step and resumed gives, bit for bit, the losses and weights of one that was not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.app.listening import Listener

from eightgig.app.training import resume
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.config import TrainingConfig, save_config
from eightgig.core.errors import CheckpointError
from eightgig.train.events import RunOutcome, SilentListener

# Ends the process as a power cut would, right after the step was logged: no clean-up of any kind runs.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from eightgig.app.training import train
from eightgig.config import load_config
from eightgig.train.events import SilentListener

class Killer(SilentListener):
    def on_step(self, record):
        if record["step"] == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1])).config
    train(config, sources={}, run_folder=Path(sys.argv[2]), listener=Killer(), command="x")
"""

UNTIMED = ("kind", "step", "loss", "learning_rate", "grad_norm", "num_target_tokens", "exact_match")


def _numbers(run_folder: Path) -> list[dict[str, object]]:
    """The records of a run without times and memory."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in UNTIMED} for line in lines]


@pytest.mark.parametrize(("killed_after", "num_workers"), [(3, 2), (5, 0)])
def test_killed_and_resumed_equals_uninterrupted(
    tiny_config: Callable[..., TrainingConfig],
    run_training: Callable[..., RunOutcome],
    tmp_path: Path,
    killed_after: int,
    num_workers: int,
) -> None:
    # Dropout makes every generator's state matter, five steps of two epochs make the order matter.
    config = tiny_config(training={"lora": {"rank": 4, "dropout": 0.2}}, data={"num_workers": num_workers})
    whole = run_training(config, name="whole")

    save_config(config, tmp_path / "config.json")
    broken = tmp_path / "broken"
    process = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path / "config.json"), str(broken), str(killed_after)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert json.loads((broken / "run.json").read_text())["status"] == "running"
    resumed = resume(broken, listener=SilentListener(), command="test")

    assert resumed.status == "finished"
    assert _numbers(broken) == _numbers(whole.run_folder)
    expected = load_file(whole.run_folder / "adapter" / "adapter_model.safetensors")
    found = load_file(broken / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_changed_since_the_checkpoint_is_refused_by_name(
    tiny_config: Callable[..., TrainingConfig], run_training: Callable[..., RunOutcome]
) -> None:
    outcome = run_training(tiny_config(training={"max_steps": 2}))
    facts = json.loads((outcome.run_folder / "run.json").read_text())
    (outcome.run_folder / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    settings = json.loads((outcome.run_folder / "config.json").read_text())
    settings["training"]["learning_rate"] = 1e-3
    (outcome.run_folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointError, match=r"written with another configuration: training\.learning_rate is 0\.001, was 0\.005\n"
    ):
        resume(outcome.run_folder, listener=SilentListener(), command="test")
    assert json.loads((outcome.run_folder / "run.json").read_text())["status"] == "failed"


def test_settings_without_effect_on_the_result_may_change(
    tiny_config: Callable[..., TrainingConfig], run_training: Callable[..., RunOutcome]
) -> None:
    outcome = run_training(tiny_config(training={"max_steps": 2}))
    facts = json.loads((outcome.run_folder / "run.json").read_text())
    (outcome.run_folder / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    settings = json.loads((outcome.run_folder / "config.json").read_text())
    settings["data"]["num_workers"] = 1
    (outcome.run_folder / "config.json").write_text(json.dumps(settings))
    listener = Listener()
    assert resume(outcome.run_folder, listener=listener, command="test").steps_done == 2
    assert [text for text in listener.texts if text.endswith("effect on what is learnt: data.num_workers is 1, was 0")]


def test_other_images_than_before_are_refused_by_name(
    tiny_config: Callable[..., TrainingConfig], tiny_data: Path, run_training: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    data = shutil.copytree(tiny_data.parent, tmp_path / "data") / tiny_data.name
    outcome = run_training(tiny_config(data={"data_path": str(data)}, training={"max_steps": 2}))
    facts = json.loads((outcome.run_folder / "run.json").read_text())
    (outcome.run_folder / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    data.write_text(data.read_text() + "\n")  # another file with the same samples
    listener = Listener()
    assert resume(outcome.run_folder, listener=listener).steps_done == 2
    assert f"without effect on what is learnt: {data} is sha256" in listener.texts[-2]
    (outcome.run_folder / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    for image in data.parent.rglob("*.png"):
        image.write_bytes(image.read_bytes() + b"x")
    said = r"another training data: .*the training images is \d+ files of [\d,]+ bytes, was \d+ files of [\d,]+ bytes"
    with pytest.raises(CheckpointError, match=said):
        resume(outcome.run_folder)


def test_a_finished_run_is_not_resumed(
    tiny_config: Callable[..., TrainingConfig], run_training: Callable[..., RunOutcome]
) -> None:
    outcome = run_training(tiny_config(training={"max_steps": 1}))
    with pytest.raises(CheckpointError, match="is finished"):
        resume(outcome.run_folder, listener=SilentListener(), command="test")
    assert len(checkpoint_paths(outcome.run_folder / "checkpoints")) == 1


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        resume(tmp_path, listener=SilentListener(), command="test")
