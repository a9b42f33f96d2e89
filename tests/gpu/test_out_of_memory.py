"""Runs on a GPU whose memory does not suffice: by the allocator's cap, and in the middle of an 8-bit update."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.app.listening import Listener
from tests.tiny import build_tiny_llava, write_llava_jsonl
from tests.train.injected_memory import FullAt

from eightgig.app import finishing, training
from eightgig.app.training import train
from eightgig.config import TrainingConfig
from eightgig.core.units import GIB
from eightgig.export.verify import Verification
from eightgig.train.events import RunOutcome
from eightgig.train.loop import TrainingLoop
from eightgig.train.recovery import read_switches
from eightgig.train.run_folder import RunFolder

pytestmark = pytest.mark.gpu

PROVED = Verification(0.0, 0.0, 0.0, None, ok=True, how="left out in this test")
NUM_SAMPLES = 64


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    model = build_tiny_llava(folder / "model", image_px=32, num_layers=12)
    return model, write_llava_jsonl(folder / "data", NUM_SAMPLES)


@pytest.fixture
def run(
    paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., RunOutcome]]:
    """Train without a plan, so that nothing is chosen beforehand, and without the fresh process."""
    monkeypatch.setattr(finishing, "verify_in_fresh_process", lambda plan, reference: PROVED)

    def train_tiny(name: str, *, listener: Listener | None = None, **hardware: Any) -> RunOutcome:
        config = TrainingConfig.model_validate(
            {
                "model": {"name": str(paths[0])},
                "data": {"data_path": str(paths[1]), "num_workers": 0, "val_fraction": 0.1},
                "training": {
                    "batch_size": 32,
                    "gradient_accumulation_steps": 1,
                    "max_steps": 4,
                    "lora": {"rank": 64, "alpha": 64},  # 4,096 weights and more have 8-bit states
                },
                "hardware": {"device": "cuda", "mixed_precision": "fp32", **hardware},
                "validation": {"every_steps": None, "num_generated": 1, "max_new_tokens": 2},
            }
        )
        return train(config, run_folder=tmp_path / name, listener=listener or Listener(), find_card=lambda device: None)

    yield train_tiny
    torch.cuda.set_per_process_memory_fraction(1.0)


def _losses(outcome: RunOutcome) -> list[float]:
    lines = (outcome.run_folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]


def _reserved_bytes(outcome: RunOutcome) -> int:
    """The most that was reserved in the rehearsal and the steps."""
    phases = json.loads((outcome.run_folder / "memory.json").read_text())["phases"]
    return max(int(phases[name]["reserved_bytes"]) for name in ("rehearse", "train"))


def test_a_run_that_does_not_fit_its_cap_goes_on_with_levers(
    run: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", gradient_checkpointing=False)
    light = run("light", offload_layer_inputs=True)
    assert _reserved_bytes(whole) > 1.2 * _reserved_bytes(light)
    cap_gib = (_reserved_bytes(whole) + _reserved_bytes(light)) / 2 / GIB

    listener = Listener()
    capped = run("capped", listener=listener, gradient_checkpointing=False, cap_gib=cap_gib)
    switches = read_switches(RunFolder(capped.run_folder))
    assert switches[0].change == "all layers are checkpointed"
    assert str(switches[0].unit) == "the rehearsal of the largest micro-batch"
    assert any("out of memory in the rehearsal" in text for text in listener.texts)
    assert capped.status == "finished"
    assert _reserved_bytes(capped) <= cap_gib * GIB
    # Kernels on the GPU add in any order, so equal within rounding, not bit for bit.
    assert _losses(capped) == pytest.approx(_losses(whole), rel=1e-3)

    torch.cuda.set_per_process_memory_fraction(1.0)
    monkeypatch.setattr(training, "read_switches", lambda folder: switches)
    told = run("told", gradient_checkpointing=False)
    assert _losses(capped) == pytest.approx(_losses(told), rel=1e-3)


@pytest.mark.parametrize("failing_step", [1, 3])
def test_an_8_bit_update_that_fails_in_its_middle_is_taken_back(
    run: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch, failing_step: int
) -> None:
    undisturbed = run("undisturbed")
    attempt, begun = TrainingLoop._attempt, []

    def attempt_on_a_full_card(loop: TrainingLoop, step: int) -> dict[str, Any]:
        begun.append(step)
        is_full = step == failing_step and begun.count(step) == 1
        with FullAt(5 if is_full else None, among="optimizer_update") as mode:
            record = attempt(loop, step)
        assert len(mode.operations) > 5  # so that the sixth of them is in the middle
        return record

    monkeypatch.setattr(TrainingLoop, "_attempt", attempt_on_a_full_card)
    listener = Listener()
    disturbed = run("disturbed", listener=listener)
    assert begun.count(failing_step) == 2
    assert any("optimizer_update" in text for text in listener.texts)
    assert _losses(disturbed) == pytest.approx(_losses(undisturbed), rel=1e-4)
