"""Runs that leave the levers to their plan. The card is made up and the run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.app.listening import Listener
from tests.tiny_families import llava
from tests.tiny_family import build_tiny_family

from eightgig.app.training import resume
from eightgig.config import TrainingConfig, load_config, save_config
from eightgig.config.levers import AUTO, LEVER_NAMES, Levers, automatic_paths
from eightgig.core.errors import CheckpointError
from eightgig.core.units import GIB, MIB
from eightgig.registry.gpus import RESERVE_GIB, GpuFacts, get_gpu
from eightgig.train import planning
from eightgig.train.events import RunOutcome

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]
UNTIMED = ("kind", "step", "loss", "learning_rate", "grad_norm", "num_target_tokens", "exact_match")

# Trains as the test does, in each of two processes; each writes down the levers with which it loads the model.
ONE_OF_TWO = """
import json, os, sys
from dataclasses import asdict, replace
from pathlib import Path
from eightgig.app import finishing
from eightgig.app.training import train
from eightgig.config import load_config
from eightgig.export.verify import Verification
from eightgig.registry.gpus import get_gpu
from eightgig.train import setup
from eightgig.train.events import SilentListener

config, folder, vram_bytes = load_config(Path(sys.argv[1])).config, Path(sys.argv[2]), int(sys.argv[3])
load_model, rank = setup.load_model, os.environ["RANK"]

def noted(config, *arguments, **options):
    Path(f"{folder}-{rank}.json").write_text(json.dumps(asdict(config.hardware.levers)))
    return load_model(config, *arguments, **options)

def card(device):
    assert rank == "0", "only the main process plans"
    return replace(get_gpu("RTX 4060"), vram_bytes=vram_bytes)

setup.load_model = noted
finishing.verify_in_fresh_process = lambda plan, reference: Verification(0.0, 0.0, 0.0, None, ok=True, how="left out")
train(config, run_folder=folder, listener=SilentListener(), find_card=card)
"""


class _Listener(Listener):
    @property
    def chosen(self) -> list[str]:
        return [text.removeprefix("chosen for this card: ") for text in self.texts if text.startswith("chosen")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tower of 32 MiB in bf16: its kept features are a lever of some weight."""
    tower = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**llava.FACTS.architecture["vision_config"], **tower}
    facts = replace(llava.FACTS, architecture={**llava.FACTS.architecture, "vision_config": vision})
    return build_tiny_family(replace(llava.TINY[0], facts=facts), tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture
def wide_config(tiny_config: Config, model: Path) -> Config:
    def make(**hardware: Any) -> TrainingConfig:
        return tiny_config(model={"name": str(model)}, hardware=hardware)

    return make


@pytest.fixture
def small_card(wide_config: Config, run_training: Train) -> GpuFacts:
    """One that lacks 4 MiB for the run with all levers off, beside what stays free for others."""
    pinned = wide_config(**asdict(Levers()))
    outcome = run_training(pinned, name="pinned", dry_run=True, find_card=lambda device: get_gpu("RTX 4060"))
    peak_bytes = _read(outcome.run_folder / "plan.json")["peak"]["device_bytes"]
    return replace(get_gpu("RTX 4060"), name="small card", vram_bytes=peak_bytes - 4 * MIB + round(RESERVE_GIB * GIB))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _numbers(run_folder: Path) -> list[dict[str, Any]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in UNTIMED} for line in lines]


def _levers(run_folder: Path) -> dict[str, Any]:
    hardware = _read(run_folder / "config.json")["hardware"]
    return {name: hardware[name] for name in LEVER_NAMES}


def test_on_a_cpu_they_are_plain_and_written_down(tiny_config: Config, run_training: Train) -> None:
    config = tiny_config(hardware={"streamed_layers": 0}, training={"max_steps": 1})
    outcome = run_training(config, sources={"seed": "default", "hardware.embedding_on_host": "default"})
    assert _levers(outcome.run_folder) == asdict(Levers())
    sources = _read(outcome.run_folder / "sources.json")
    assert {path for path, source in sources.items() if source == AUTO} == automatic_paths(config)
    assert "hardware.streamed_layers" not in sources
    assert sources["seed"] == "default"


def test_a_card_that_lacks_room_gets_the_lever_that_makes_it(
    wide_config: Config, run_training: Train, small_card: GpuFacts
) -> None:
    listener = _Listener()
    outcome = run_training(wide_config(), listener=listener, find_card=lambda device: small_card)
    planned = _read(outcome.run_folder / "plan.json")
    assert planned["fits"] is True
    levers = _levers(outcome.run_folder)
    assert levers["cache_image_features"] is True
    assert levers == {name: planned["config"]["hardware"][name] for name in LEVER_NAMES}
    assert levers | {"cache_image_features": False, "checkpointed_layers": None} == asdict(Levers())
    assert listener.chosen[0].startswith("image features kept: saves ")
    assert listener.chosen[0].endswith("without it 4.00 MiB would be missing")
    assert any(text.startswith("image features: 14 images") for text in listener.texts)
    explicit = load_config(outcome.run_folder / "config.json").config
    assert not automatic_paths(explicit)
    again = run_training(explicit, name="explicit", find_card=lambda device: small_card)
    assert _numbers(again.run_folder) == _numbers(outcome.run_folder)


def test_what_is_pinned_off_stays_off_and_the_run_is_tried(
    wide_config: Config, run_training: Train, small_card: GpuFacts
) -> None:
    listener = _Listener()
    config = wide_config(cache_image_features=False)
    outcome = run_training(config, listener=listener, dry_run=True, find_card=lambda device: small_card)
    assert _levers(outcome.run_folder) == asdict(Levers())
    assert listener.chosen == []
    (warning,) = [text for text in listener.texts if "not expected to fit" in text]
    assert "with none of the levers that are left to the plan" in warning


def test_features_are_not_chosen_where_the_disk_has_no_room(
    wide_config: Config, run_training: Train, small_card: GpuFacts
) -> None:
    listener = _Listener()
    config = wide_config(feature_cache_gib=1e-6)
    outcome = run_training(config, listener=listener, dry_run=True, find_card=lambda device: small_card)
    assert _levers(outcome.run_folder) == asdict(Levers())
    (text,) = [text for text in listener.texts if text.startswith("kept image features would suit")]
    assert "planning without" in text


def test_memory_that_others_have_is_left_to_them(
    wide_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eightgig.train.setup.used_by_others", lambda device, context_bytes: GIB + 1)
    outcome = run_training(wide_config(), dry_run=True, find_card=lambda device: get_gpu("RTX 4060"))
    left_bytes = get_gpu("RTX 4060").vram_bytes - _read(outcome.run_folder / "plan.json")["budget_bytes"]
    assert left_bytes == GIB + planning.OTHERS_STEP_BYTES


def test_a_resumed_run_goes_on_with_what_was_chosen(
    wide_config: Config, run_training: Train, small_card: GpuFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_training(wide_config(), name="whole", find_card=lambda device: small_card)
    with pytest.raises(KeyboardInterrupt):
        run_training(wide_config(), name="cut", listener=_Listener(3), find_card=lambda device: small_card)
    before = _read(tmp_path / "cut" / "config.json")
    monkeypatch.setattr(planning, "plan_with_levers", lambda *_, **__: pytest.fail("planned again"))
    resume(tmp_path / "cut", find_card=lambda device: get_gpu("RTX 3090"))
    assert _read(tmp_path / "cut" / "config.json") == before
    assert _numbers(tmp_path / "cut") == _numbers(whole.run_folder)


def test_a_lever_changed_by_hand_is_noticed(wide_config: Config, run_training: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(wide_config(), listener=_Listener(3))
    path = tmp_path / "run" / "config.json"
    config = _read(path)
    config["hardware"]["embedding_on_host"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="configuration"):
        resume(tmp_path / "run")


def test_an_equal_run_takes_the_plan_that_was_kept(
    wide_config: Config, run_training: Train, small_card: GpuFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_training(wide_config(), name="first", dry_run=True, find_card=lambda device: small_card)
    made: list[torch.device] = []
    plan_with_levers = planning.plan_with_levers

    def counted(*arguments: Any, **keywords: Any) -> Any:
        made.append(torch.device("cpu"))
        return plan_with_levers(*arguments, **keywords)

    monkeypatch.setattr(planning, "plan_with_levers", counted)
    second = run_training(wide_config(), name="second", dry_run=True, find_card=lambda device: small_card)
    assert not made
    assert _read(second.run_folder / "plan.json") == _read(first.run_folder / "plan.json")
    assert _levers(second.run_folder) == _levers(first.run_folder)
    larger = replace(small_card, vram_bytes=small_card.vram_bytes + 64 * MIB)
    third = run_training(wide_config(), name="third", dry_run=True, find_card=lambda device: larger)
    assert len(made) == 1
    assert _levers(third.run_folder)["cache_image_features"] is False


def test_all_processes_use_what_the_main_one_chose(
    wide_config: Config, run_training: Train, small_card: GpuFacts, tmp_path: Path
) -> None:
    save_config(wide_config(), tmp_path / "config.json")
    (tmp_path / "one_of_two.py").write_text(ONE_OF_TWO)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = [tmp_path / "one_of_two.py", tmp_path / "config.json", tmp_path / "two", small_card.vram_bytes]
    process = subprocess.run(
        [*launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    main, other = (_read(tmp_path / f"two-{rank}.json") for rank in (0, 1))
    assert main == other == _levers(tmp_path / "two")
    assert main["cache_image_features"] is True
