"""A run that plans its memory. The card is made up and the run on the CPU; only the measuring is stood in for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import UnsupportedModel
from eightgig.core.units import GIB, MIB
from eightgig.registry.gpus import GpuFacts, get_gpu
from eightgig.train import planning
from eightgig.train.events import RunOutcome, SilentListener
from eightgig.train.memory_meter import GpuPeaks, MemoryMeter

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]
MEASURED = GpuPeaks(2 * GIB, 3 * GIB, 4 * GIB, 8 * GIB, counts_other_programs=False)


class _Listener(SilentListener):
    """Keeps the messages, each with the number of steps done before it; stops after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.messages: list[tuple[int, str]] = []
        self._num_steps = 0
        self._stop_after = stop_after

    def on_message(self, text: str) -> None:
        self.messages.append((self._num_steps, text))

    def on_step(self, record: Any) -> None:
        self._num_steps += 1
        if self._num_steps == self._stop_after:
            raise KeyboardInterrupt

    def said(self, text: str) -> list[int]:
        """After how many steps something with `text` was said."""
        return [num_steps for num_steps, message in self.messages if text in message]


def rtx_4060(device: torch.device) -> GpuFacts | None:
    """A card to plan for, whatever the device."""
    return get_gpu("RTX 4060")


def _losses(run_folder: Path) -> list[float]:
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_on_a_cpu_nothing_is_planned_said_or_kept(tiny_config: Config, run_training: Train) -> None:
    listener = _Listener()
    outcome = run_training(tiny_config(training={"max_steps": 3}), listener=listener)
    assert not (outcome.run_folder / "plan.json").exists()
    assert "planned" not in _read(outcome.run_folder / "memory.json")
    assert listener.said("plan") == listener.said("GPU memory") == []


def test_the_plan_is_of_the_runs_own_data_and_changes_nothing_about_the_run(
    tiny_config: Config, run_training: Train
) -> None:
    config = tiny_config(training={"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3})
    codes = dict(functional.name2qmap)
    alone = run_training(config, name="alone")
    listener = _Listener()
    outcome = run_training(config, name="planned", listener=listener, find_card=rtx_4060)
    assert _losses(outcome.run_folder) == _losses(alone.run_folder)
    assert functional.name2qmap == codes

    plan = _read(outcome.run_folder / "plan.json")
    assert (plan["gpu"], plan["fits"], plan["workload"]["num_samples"]) == ("RTX 4060", True, 2)
    steps = map(json.loads, (outcome.run_folder / "metrics.jsonl").read_text().splitlines())
    most_tokens = max(record["num_tokens"] for record in steps if record["kind"] == "step")
    assert plan["workload"]["num_tokens"] * 2 >= most_tokens, "no step can have more than its largest micro-batches"
    assert sum(plan["breakdown"].values()) == plan["peak"]["device_bytes"]
    said = next(text for _, text in listener.messages if text.startswith("planned: "))
    assert said == f"planned: {plan['peak']['device_bytes'] / MIB:.2f} MiB on the card at most, in training"
    assert listener.said("not expected to fit") == []


def test_measured_stands_beside_planned_after_two_steps_and_at_the_end(
    tiny_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryMeter, "gpu_peaks", lambda self: MEASURED)
    listener = _Listener()
    outcome = run_training(tiny_config(training={"max_steps": 4}), listener=listener, find_card=rtx_4060)
    assert listener.said("GPU memory: allocated 2.00 GiB (planned ") == [2, 4]
    memory, plan = _read(outcome.run_folder / "memory.json"), _read(outcome.run_folder / "plan.json")
    assert memory["planned"] == {
        name: plan["peak"][name] for name in ("allocated_bytes", "reserved_bytes", "device_bytes")
    } | {"breakdown": plan["breakdown"]}
    assert outcome.peak["planned"] == memory["planned"]
    assert memory["device_used_bytes"] == MEASURED.device_bytes
    assert 'id="plan"' in (outcome.run_folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("vram_gib", "hardware", "said"),
    [
        # Kept free for others, as `eightgig plan` does: 0.4 GiB.
        (0.7, {}, "this is not expected to fit the small card, which leaves 307.20 MiB"),
        (8.0, {}, None),
        # The cap leaves out the context of 762 MiB, which the plan counts: 762 + 0.01 * 1024 MiB.
        (
            8.0,
            {"device": "auto", "cap_gib": 0.01},
            "this is not expected to fit hardware.cap_gib = 0.01, which leaves 772.24 MiB",
        ),
        (8.0, {"device": "auto", "cap_gib": 1.0}, None),
    ],
)
def test_what_does_not_fit_is_said_and_tried(
    tiny_config: Config,
    run_training: Train,
    monkeypatch: pytest.MonkeyPatch,
    vram_gib: float,
    hardware: dict[str, Any],
    said: str | None,
) -> None:
    monkeypatch.setattr("eightgig.train.setup.limit_allocator", lambda device, cap_gib: None)  # it refuses a CPU
    card = replace(get_gpu("RTX 4060"), name="small card", vram_bytes=round(vram_gib * GIB))
    listener = _Listener()
    config = tiny_config(training={"max_steps": 1}, hardware=hardware)
    outcome = run_training(config, listener=listener, find_card=lambda device: card)
    warnings = [text for _, text in listener.messages if "not expected to fit" in text]
    assert len(warnings) == (said is not None)
    assert said is None or (said in warnings[0] and "Lower data.max_length" in warnings[0])
    assert _read(outcome.run_folder / "plan.json")["fits"] is (said is None)
    assert outcome.status == "finished"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UnsupportedModel("no such thing\n  here", expected="a", next_step="b"), "no such thing"),
        (RuntimeError("aten.item needs a value"), "RuntimeError: aten.item needs a value"),
    ],
)
def test_a_model_that_cant_be_planned_is_trained(
    tiny_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(planning, "plan_with_levers", refuse)
    listener = _Listener()
    outcome = run_training(tiny_config(training={"max_steps": 3}), listener=listener, find_card=rtx_4060)
    assert (0, f"training goes on without a plan of its memory: {said}") in listener.messages
    assert listener.said("GPU memory") == []
    assert not (outcome.run_folder / "plan.json").exists()


def test_a_dry_run_plans_and_its_folder_is_taken_anew(tiny_config: Config, run_training: Train) -> None:
    outcome = run_training(tiny_config(), dry_run=True, find_card=rtx_4060)
    assert _read(outcome.run_folder / "plan.json")["model"]
    again = run_training(tiny_config(training={"max_steps": 1}))
    assert again.run_folder == outcome.run_folder
    assert not (again.run_folder / "plan.json").exists()


def test_a_resumed_run_keeps_its_plan(
    tiny_config: Config, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config(), listener=_Listener(stop_after=3), find_card=rtx_4060)
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    monkeypatch.setattr(planning, "plan_with_levers", lambda *_, **__: pytest.fail("planned again"))
    monkeypatch.setattr(MemoryMeter, "gpu_peaks", lambda self: MEASURED)
    listener = _Listener()
    resume(tmp_path / "run", listener=listener, find_card=lambda device: get_gpu("RTX 3090"))
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan
    assert listener.said("planned: ")[0] == 0
    assert listener.said("GPU memory: ") == [2, 4], "two steps after the checkpoint of step 2, and at the end"
    assert (
        _read(tmp_path / "run" / "memory.json")["planned"]["device_bytes"] == json.loads(plan)["peak"]["device_bytes"]
    )


def test_a_damaged_plan_is_made_again(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny_config(), listener=_Listener(stop_after=3), find_card=rtx_4060)
    path = tmp_path / "run" / "plan.json"
    whole = _read(path)
    path.write_text('{"peak": {}}')
    resume(tmp_path / "run", find_card=rtx_4060)
    assert _read(path) == {**whole, "levers": []}, (
        "the run keeps what was chosen at its start: nothing is left to choose"
    )
