"""A run with all levers on its layers, and with those on its other weights, to the losses that it writes down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import build_tiny_llava, write_llava_jsonl

from eightgig.app.training import train
from eightgig.config import TrainingConfig
from eightgig.memory import host_copies, layer_inputs
from eightgig.train.events import SilentListener


def _losses(folder: Path, name: str, hardware: dict[str, Any]) -> list[float]:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(folder / "model")},
            "data": {"data_path": str(folder / "data" / "train.jsonl"), "num_workers": 0, "val_fraction": 0.2},
            "training": {
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "learning_rate": 5e-3,
                "lora": {"dropout": 0.0},  # tiles draw other numbers
            },
            "hardware": {"device": "cpu", "mixed_precision": "fp32", **hardware},
            "validation": {"num_generated": 1, "max_new_tokens": 2},
        }
    )
    outcome = train(config, sources={}, run_folder=folder / name, listener=SilentListener(), command="test")
    lines = (outcome.run_folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_run_with_all_of_them_learns_as_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_tiny_llava(tmp_path / "model", num_layers=4)
    write_llava_jsonl(tmp_path / "data", 16)
    taken: list[int] = []
    take = host_copies.HostPieces.take

    def counted(self: host_copies.HostPieces, num_bytes: int) -> Any:
        taken.append(num_bytes)
        return take(self, num_bytes)

    monkeypatch.setattr(host_copies.HostPieces, "take", counted)
    plain = _losses(tmp_path, "plain", {})
    assert taken == []
    levers = {"checkpointed_layers": 3, "offload_layer_inputs": True, "mlp_tile_tokens": 20}
    others = {"streamed_layers": 3, "embedding_on_host": True, "cache_image_features": True}
    for name, hardware in (
        ("levered", levers),
        ("all", {**levers, **others}),
        ("fused", {**levers, **others, "fused_lora": True}),
    ):
        taken.clear()
        assert _losses(tmp_path, name, hardware) == pytest.approx(plain, rel=1e-5)
        # Steps, micro-batches, checkpointed layers but the last; and the rehearsal's two passes.
        assert len(taken) == (3 * 2 + 2) * 2
