"""What only a CUDA device can show. Run on the lent machine: `python -m pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava, write_llava_jsonl

from eightgig.app.training import resume, train
from eightgig.config import TrainingConfig
from eightgig.config.levers import Levers
from eightgig.core.errors import DoesNotFit
from eightgig.train.events import RunOutcome, SilentListener

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    return build_tiny_llava(folder / "model", image_px=32), write_llava_jsonl(folder / "data", 12)


@pytest.fixture
def run(paths: tuple[Path, Path], tmp_path: Path) -> Callable[..., RunOutcome]:
    def train_tiny(*, name: str = "run", listener: Any = None, **sections: dict[str, Any]) -> RunOutcome:
        values: dict[str, Any] = {
            "model": {"name": str(paths[0])},
            "data": {"data_path": str(paths[1]), "num_workers": 2, "val_fraction": 0.2},
            "training": {"gradient_accumulation_steps": 4, "max_steps": 8, "learning_rate": 5e-3},
            "hardware": {"device": "cuda"},
            "validation": {"num_generated": 1, "max_new_tokens": 4},
            "checkpoints": {"every_steps": 2},
        }
        for section, changes in sections.items():
            values[section] = values[section] | changes
        return train(
            TrainingConfig.model_validate(values),
            sources={},
            run_folder=tmp_path / name,
            listener=listener or SilentListener(),
            command="test",
        )

    return train_tiny


def _losses(outcome: RunOutcome) -> list[float]:
    lines = (outcome.run_folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]


@pytest.mark.parametrize("optimizer", ["auto", "paged_adamw_8bit", "adamw"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_it_learns_in_every_precision_with_every_optimizer(
    run: Callable[..., RunOutcome], precision: str, optimizer: str
) -> None:
    outcome = run(hardware={"mixed_precision": precision}, training={"optimizer": optimizer})
    losses = _losses(outcome)
    assert losses[-1] < losses[0]
    assert outcome.verification is not None
    assert outcome.verification["ok"]


def test_the_categories_of_memory_add_up_to_the_peak(run: Callable[..., RunOutcome]) -> None:
    peak = run().peak
    inside = {name: size for name, size in peak["categories"].items() if name != "CUDA context"}
    assert sum(inside.values()) == peak["peak_reserved_bytes"]
    assert all(size >= 0 for size in peak["categories"].values())


def test_checkpointing_takes_less_memory_and_gives_the_same_loss(run: Callable[..., RunOutcome]) -> None:
    training = {"batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
    kept = run(name="kept", training=training, hardware={"gradient_checkpointing": False})
    recomputed = run(
        name="recomputed", training=training, hardware={"gradient_checkpointing": True, "checkpointed_layers": None}
    )
    assert recomputed.peak["peak_allocated_bytes"] < kept.peak["peak_allocated_bytes"]
    assert _losses(recomputed) == pytest.approx(_losses(kept), rel=2e-3)


def test_a_cap_that_is_too_small_says_what_does_not_fit(
    run: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eightgig.train.recovery.next_levers", lambda *_, **__: None)
    try:
        with pytest.raises(DoesNotFit, match=r"ran out of memory in step \d+|does not fit into the cap of 0\.06 GiB"):
            run(
                hardware={"cap_gib": 0.06, "rehearsal": False, **asdict(Levers())},
                training={"batch_size": 8, "gradient_accumulation_steps": 1},
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_interrupted_run_goes_on_to_nearly_the_same_losses(run: Callable[..., RunOutcome], tmp_path: Path) -> None:
    class Stopping(SilentListener):
        def on_step(self, record: Any) -> None:
            if record["step"] == 5:
                raise KeyboardInterrupt

    whole = run(name="whole")
    with pytest.raises(KeyboardInterrupt):
        run(name="stopped", listener=Stopping())
    resumed = resume(tmp_path / "stopped", listener=SilentListener(), command="test")
    # Kernels on the GPU add in any order, so equal within rounding, not bit for bit.
    assert _losses(resumed) == pytest.approx(_losses(whole), rel=1e-2)


def test_the_plan_agrees_with_what_is_measured(run: Callable[..., RunOutcome]) -> None:
    class Listener(SilentListener):
        def __init__(self) -> None:
            self.messages: list[str] = []

        def on_message(self, text: str) -> None:
            self.messages.append(text)

    listener = Listener()
    outcome = run(listener=listener, training={"batch_size": 4, "gradient_accumulation_steps": 2})
    plan = json.loads((outcome.run_folder / "plan.json").read_text())
    memory = json.loads((outcome.run_folder / "memory.json").read_text())
    assert plan["budget_bytes"] == torch.cuda.get_device_properties(0).total_memory
    assert {name: memory["planned"][name] for name in plan["peak"] if name != "moment"} == {
        name: size for name, size in plan["peak"].items() if name != "moment"
    }
    # A tiny model's few MiB are rounded to segments of 2 and 20 MiB, and the context may be another than the table's.
    assert memory["planned"]["allocated_bytes"] == pytest.approx(memory["peak_allocated_bytes"], abs=2 * 2**20)
    assert memory["planned"]["reserved_bytes"] == pytest.approx(memory["peak_reserved_bytes"], abs=20 * 2**20)
    assert memory["planned"]["device_bytes"] == pytest.approx(memory["device_used_bytes"], abs=300 * 2**20)
    assert sum(message.startswith("planned: ") for message in listener.messages) == 1
    assert sum(message.startswith("GPU memory: allocated ") for message in listener.messages) == 2
