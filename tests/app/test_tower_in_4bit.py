"""Whole runs with a vision tower in 4 bits: the receipt says what that changes, the proof reloads it so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.app.listening import Listener

from eightgig.app.inspection import inspect
from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import DoesNotFit
from eightgig.train import tower_difference
from eightgig.train.events import RunOutcome

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]
TOWER = {"quantization": {"vision_tower": True}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eightgig" / "features"


def test_the_receipt_has_the_difference_and_the_proof_reloads_the_same(
    tiny_config: Config, run_training: Train
) -> None:
    listener = Listener()
    run = run_training(tiny_config(training=TOWER), is_proved=True, listener=listener)
    receipt = inspect(str(run.run_folder))
    assert receipt.tower_difference is not None
    assert receipt.tower_difference.num_images == tower_difference.NUM_IMAGES
    assert 0 < receipt.tower_difference.mean_relative_error <= receipt.tower_difference.worst_relative_error < 1
    assert any(row.group == "vision tower" and row.is_4bit for row in receipt.rows)
    assert any(row.group == "adapters" for row in receipt.rows)  # the receipt is the one after adapters came
    mean = f"{100 * receipt.tower_difference.mean_relative_error:.2f} % on average"
    assert any(
        text.startswith("vision tower in 4 bits: its features differ") and mean in text for text in listener.texts
    )
    assert mean.removesuffix(" on average") in (run.run_folder / "report.html").read_text()
    assert run.verification is not None
    assert run.verification["ok"]
    assert run.verification["relative_difference"] <= 1e-5


def test_a_run_in_16_bits_says_nothing_of_it(tiny_config: Config, run_training: Train) -> None:
    run = run_training(tiny_config(training={"max_steps": 1}))
    assert json.loads((run.run_folder / "receipt.json").read_text())["tower_difference"] is None
    assert "vision tower is in 4 bits" not in (run.run_folder / "report.html").read_text()


def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    tiny_config: Config, run_training: Train, tmp_path: Path
) -> None:
    whole = run_training(tiny_config(training=TOWER), name="whole")
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config(training=TOWER), name="stopped", listener=Listener(stop_after=4))
    resume(tmp_path / "stopped")
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    receipts = [json.loads((tmp_path / name / "receipt.json").read_text()) for name in ("whole", "stopped")]
    assert receipts[0] == receipts[1]
    assert whole.run_folder == tmp_path / "whole"


def test_features_of_both_towers_are_kept_apart(tiny_config: Config, run_training: Train, cache: Path) -> None:
    cached = {"cache_image_features": True}
    for name, training in (("plain", {}), ("tower", TOWER), ("again", TOWER)):
        listener = Listener()
        run_training(tiny_config(hardware=cached, training=training | {"max_steps": 2}), name=name, listener=listener)
        (text,) = [text for text in listener.texts if "kept from before" in text]
        assert (", 0 of them" in text) is (name != "again")
    assert len(list(cache.iterdir())) == 2


def test_data_without_images_has_nothing_to_compare(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "One and one?"}, {"from": "gpt", "value": "Two."}]
    data = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"id": str(i), "conversations": turns} for i in range(8)])
    listener = Listener()
    run = run_training(tiny_config(data={"data_path": str(data)}, training=TOWER | {"max_steps": 1}), listener=listener)
    assert inspect(str(run.run_folder)).tower_difference is None
    assert "vision tower in 4 bits: no image to compare it with" in listener.texts


def test_a_card_too_small_for_one_image_is_said(
    tiny_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tower_difference, "tower_difference", full)
    with pytest.raises(DoesNotFit, match="while the vision tower in 4 bits was compared"):
        run_training(tiny_config(training=TOWER))
