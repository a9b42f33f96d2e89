"""What must be the same on resume changes the fingerprint; what may differ does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from eightgig.config import TrainingConfig
from eightgig.train.fingerprint import WITHOUT_EFFECT_ON_RESULT, fingerprint

WEIGHTS = {"a": nn.Parameter(torch.zeros(2, 3)), "b": nn.Parameter(torch.zeros(4))}


def _marks(settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, str]:
    arguments: dict[str, Any] = {"data_fingerprint": "d", "trainable": WEIGHTS} | changes
    return fingerprint(TrainingConfig.model_validate(settings or {}), **arguments)


def _other_values() -> Iterator[tuple[str, Any, bool]]:
    """A setting's path, another value for it, and whether a resumed run may have it."""
    yield "output_dir", "elsewhere", True
    yield "data.num_workers", 7, True
    yield "data.worker_start_method", "spawn", True
    yield "hardware.cap_gib", 5.5, True
    yield "hardware.feature_cache_gib", 20.0, True
    yield "training.max_skipped_steps", 9, True
    yield "data.worker_timeout_s", 60, True
    yield "hardware.rehearsal", False, True
    yield "checkpoints.every_steps", 7, True
    yield "checkpoints.keep_last", 9, True
    yield "checkpoints.when_disk_is_full", "go_on", True
    yield "seed", 43, False
    yield "model.name", "llava-1.5-13b", False
    yield "model.random_weights_seed", 1, False
    yield "training.batch_size", 2, False
    yield "training.learning_rate", 1e-5, False
    yield "training.max_steps", 11, False
    yield "training.lora.rank", 4, False
    yield "training.quantization.bnb_4bit_quant_type", "fp4", False
    yield "data.max_length", 100, False
    yield "data.image_size", 224, False
    yield "data.val_fraction", 0.1, False
    yield "hardware.mixed_precision", "fp32", False
    yield "hardware.gradient_checkpointing", False, False
    yield "hardware.checkpointed_layers", 3, False
    yield "hardware.offload_layer_inputs", True, False
    yield "hardware.mlp_tile_tokens", 512, False
    yield "hardware", {"mlp_tile_tokens": 512, "tiled_projections": True}, False
    yield "hardware.cache_image_features", True, False


@pytest.mark.parametrize(("path", "value", "may_change"), list(_other_values()))
def test_settings(path: str, value: Any, may_change: bool) -> None:
    settings: Any = value
    for key in reversed(path.split(".")):
        settings = {key: settings}
    before, after = _marks(), _marks(settings)
    assert (before["configuration"] == after["configuration"]) is may_change
    assert {name: mark for name, mark in before.items() if name != "configuration"} == {
        name: mark for name, mark in after.items() if name != "configuration"
    }


def test_what_is_left_out_is_tested_above() -> None:
    tested = {path for path, _, may_change in _other_values() if may_change}
    assert all(any(path.startswith(".".join(left_out)) for path in tested) for left_out in WITHOUT_EFFECT_ON_RESULT)


def test_data_and_weights_have_marks_of_their_own() -> None:
    assert _marks()["training data"] != _marks(data_fingerprint="e")["training data"]
    for other in (
        {"a": WEIGHTS["a"]},
        {"a": WEIGHTS["a"], "c": WEIGHTS["b"]},
        {"a": WEIGHTS["a"].detach().T, "b": WEIGHTS["b"]},
    ):
        assert _marks(trainable=other)["set of trainable weights"] != _marks()["set of trainable weights"]
    moved = {name: nn.Parameter(weight + 1) for name, weight in WEIGHTS.items()}
    assert _marks(trainable=moved) == _marks()  # values are what a run changes
