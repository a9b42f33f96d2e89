"""A tiny model and data set, and a way to run the whole of `eightgig train` on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.app.command_line import CommandLine
from tests.tiny import build_tiny_llava, write_llava_jsonl

from eightgig.app import finishing
from eightgig.app.training import train
from eightgig.config import TrainingConfig
from eightgig.export.verify import Verification
from eightgig.train.events import RunOutcome, SilentListener

NUM_SAMPLES = 14
NOT_PROVED = Verification(0.0, 0.0, 0.0, None, ok=True, how="left out in this test")
IMAGE_PX = 32


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("tiny") / "model", image_px=IMAGE_PX)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_llava_jsonl(folder, NUM_SAMPLES, num_turns=2)


@pytest.fixture
def eightgig(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> CommandLine:
    """The command, called in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, tiny_model, tiny_data, capsys)


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tiny_data: Path) -> Callable[..., TrainingConfig]:
    """Settings of a run of six steps in fp32; keyword arguments replace whole sections' keys, e.g. training={...}."""

    def make(**sections: dict[str, Any]) -> TrainingConfig:
        values: dict[str, Any] = {
            "model": {"name": str(tiny_model)},
            "data": {"data_path": str(tiny_data), "num_workers": 0, "val_fraction": 0.15},
            "training": {"batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6, "learning_rate": 5e-3},
            "hardware": {"device": "cpu", "mixed_precision": "fp32"},
            "validation": {"every_steps": 4, "num_generated": 1, "max_new_tokens": 4},
            "checkpoints": {"every_steps": 2, "keep_last": 3},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return TrainingConfig.model_validate(values)

    return make


@pytest.fixture
def run_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunOutcome]:
    """Train as a config says, in a new folder below the test's own, with a cache folder there too.

    The fresh process at the end takes most of a tiny run's time: it is left out where `is_proved` is not set.
    """

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(config: TrainingConfig, *, name: str = "run", is_proved: bool = False, **changes: Any) -> RunOutcome:
        if not is_proved:
            monkeypatch.setattr(finishing, "verify_in_fresh_process", lambda plan, reference: NOT_PROVED)
        arguments: dict[str, Any] = {"listener": SilentListener(), "command": "test", "sources": {}}
        return train(config, run_folder=tmp_path / name, **(arguments | changes))

    return run
