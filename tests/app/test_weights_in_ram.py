"""Whole runs with weights in RAM: losses, answers and adapter of a run without, through a checkpoint and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import build_tiny_llava, write_image

from eightgig.app.prediction import predict
from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.data import loader
from eightgig.train.events import RunOutcome, SilentListener

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]

IN_RAM = {"streamed_layers": 3, "embedding_on_host": True}


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("deep") / "model", image_px=32, num_layers=4)


def _records(folder: Path) -> list[dict[str, Any]]:
    """Losses of steps and validation, and answers: what is learnt, without times and memory."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: line.get(key) for key in ("kind", "step", "loss", "exact_match")} for line in lines]


def test_a_run_with_weights_in_ram_is_the_run_without(
    deep_model: Path, tiny_config: Config, run_training: Train, tmp_path: Path
) -> None:
    outcomes = {}
    for name, hardware in (("plain", {}), ("in RAM", IN_RAM)):
        config = tiny_config(model={"name": str(deep_model)}, hardware=hardware)
        outcomes[name] = run_training(config, name=name, is_proved=True)
        verification = outcomes[name].verification
        assert verification is not None
        assert verification["ok"]
        assert ("streamed by EightGig" in verification["how"]) is bool(hardware)
    plain, ours = (outcome.run_folder for outcome in outcomes.values())
    assert _records(ours) == _records(plain)
    expected, weights = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (plain, ours))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    memory = json.loads((ours / "memory.json").read_text())
    assert memory["host_weights_bytes"] > memory["categories"]["4-bit weights"] > 0
    assert memory["streamed_bytes"] > 0
    assert "uint8 in RAM" in (ours / "report.html").read_text()
    image = write_image(tmp_path / "asked.png")
    answers = [predict(question="What is it?", images=[image], run=folder).answer for folder in (plain, ours)]
    assert answers[0] == answers[1]


def test_an_interrupted_run_goes_on_with_its_weights_in_ram(
    deep_model: Path, tiny_config: Config, run_training: Train, tmp_path: Path
) -> None:
    class Stopping(SilentListener):
        def on_step(self, record: Any) -> None:
            if record["step"] == 5:
                raise KeyboardInterrupt

    config = tiny_config(model={"name": str(deep_model)}, hardware=IN_RAM)
    whole = run_training(config, name="whole")
    with pytest.raises(KeyboardInterrupt):
        run_training(config, name="stopped", listener=Stopping())
    resumed = resume(tmp_path / "stopped", listener=SilentListener(), command="test")
    steps = [
        [record for record in _records(outcome.run_folder) if record["kind"] == "step"] for outcome in (whole, resumed)
    ]
    assert steps[0] == steps[1]


def test_micro_batches_that_share_a_pass_train_the_same(
    deep_model: Path, tiny_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses, validation and answers of one micro-batch after the other, for a quarter of what is streamed."""
    sizes: list[int] = []
    collate = loader.collate
    monkeypatch.setattr(loader, "collate", lambda samples, *rest: sizes.append(len(samples)) or collate(samples, *rest))
    streamed, records = {}, {}
    for together in (1, 4):
        sizes.clear()
        hardware = {**IN_RAM, "streamed_layers": 4, "micro_batches_per_pass": together}
        config = tiny_config(model={"name": str(deep_model)}, hardware=hardware)
        folder = run_training(config, name=f"{together} a pass").run_folder
        records[together] = _records(folder)
        streamed[together] = json.loads((folder / "memory.json").read_text())["streamed_bytes"]
        assert max(sizes) == together
    for ours, alone in zip(records[4], records[1], strict=True):
        assert ours == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-4)}
    assert streamed[4] < streamed[1]
