"""Plans of a tiny model through the real command: what is kept, what is written, what a mistake says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.app.command_line import CommandLine, check_message
from tests.tiny import write_image, write_jsonl

from eightgig.app.card_wanted import CardWanted
from eightgig.app.planning import compare_as_json, plan_as_json, plan_run
from eightgig.config import ConfigPresets, TrainingConfig
from eightgig.core.errors import UnsupportedModel
from eightgig.plan import plan as plan_module
from eightgig.plan.plan import PlannedTime

CARD = CardWanted(gpu="RTX 4060")
SMALL = ("--set", "data.image_size=32", "--gpu", "RTX 4060")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a cache of its own, beside its folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def num_planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the planner was at work."""
    calls: list[Any] = []
    real = plan_module.plan

    def counting(*positional: Any, **named: Any) -> Any:
        calls.append(positional)
        return real(*positional, **named)

    monkeypatch.setattr(plan_module, "plan", counting)
    return lambda: len(calls)


def settings(model: Path, data: Path | None = None, **overrides: Any) -> TrainingConfig:
    return ConfigPresets.ultra_low_memory(
        data_path=data, overrides={"model.name": str(model), "data.image_size": 32, **overrides}
    )


def test_a_kept_plan_is_the_one_that_was_made(
    tiny_model: Path, tiny_data: Path, num_planned: Callable[[], int]
) -> None:
    config = settings(tiny_model, tiny_data)
    first = plan_as_json(config, CARD)
    made = num_planned()
    assert made > 0
    assert plan_as_json(config, CARD) == first
    assert num_planned() == made
    assert plan_as_json(config, CARD, uses_cache=False) == first
    assert num_planned() == 2 * made


def test_whatever_changes_a_plan_has_it_made_anew(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, num_planned: Callable[[], int]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data.parent, data)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = settings(model, data / tiny_data.name)
    plan_as_json(config, CARD)

    def is_made_anew(config: TrainingConfig, card: CardWanted = CARD) -> bool:
        before = num_planned()
        plan_as_json(config, card)
        return num_planned() > before

    assert not is_made_anew(config)
    assert is_made_anew(settings(model, data / tiny_data.name, **{"training.lora.rank": 4}))
    assert is_made_anew(config, CardWanted(gpu="RTX 3090"))
    assert is_made_anew(config, CardWanted(gpu="RTX 4060", reserve_gib=1))
    assert not is_made_anew(config)
    write_image(data / "images" / "train-0.png", size=(300, 20))
    assert is_made_anew(config)
    text = (data / tiny_data.name).read_text()
    (data / tiny_data.name).write_text(text.replace("It is", "Today it is"))
    assert is_made_anew(config)
    os.utime(model / "config.json", (1, 1))
    assert is_made_anew(config)
    assert not is_made_anew(config)


def test_a_damaged_entry_is_made_anew(tiny_model: Path, own_cache: Path) -> None:
    config = settings(tiny_model)
    first = plan_as_json(config, CARD)
    (entry,) = (own_cache / "eightgig" / "plans").iterdir()
    entry.write_text("{")
    assert plan_as_json(config, CARD) == first
    assert json.loads(entry.read_text())["value"] == first


def test_a_kept_plan_is_found_without_torch(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    arguments = ["plan", str(tiny_model), "--data", str(tiny_data), *SMALL]
    code = (
        "import sys\n"
        "from eightgig.cli.entry import run_command\n"
        f"code = run_command({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "print('imported', sorted(heavy), code)\n"
    )

    def outcome() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=200
        )
        return done.stdout.splitlines()

    cold, warm = outcome(), outcome()
    assert "torch" in cold[-1]
    assert warm[-1] == "imported [] 0"
    assert warm[:-1] == cold[:-1]


def test_data_decides_memory_and_length_of_an_epoch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{'word ' * length}end" for length in (1, 90, 5, 9)]
    path = write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": text} for text in texts])
    changes = {"data.val_fraction": 0, "training.gradient_accumulation_steps": 3}
    config = settings(tiny_model, path, **changes)
    real = plan_module.plan

    def with_time(*positional: Any, **named: Any) -> Any:
        """A second a token, so that the time tells which micro-batch it was taken of."""
        made = real(*positional, **named)
        time = PlannedTime(float(made.workload["num_tokens"]), None, 1.0, "estimated from the card's data sheet")
        return replace(made, time=time)

    monkeypatch.setattr(plan_module, "plan", with_time)
    planned = plan_run(config, gpu="RTX 4060")
    data = planned.workload["data"]
    assert data["samples"] == [f"{path}:2"]
    assert planned.workload["num_tokens"] == planned.workload["num_text_tokens"] == data["max_tokens"]
    assert (data["num_train_samples"], data["steps_an_epoch"], data["notes"]) == (4, 2, [])
    assert planned.time is not None
    assert planned.time.step_s < data["mean_tokens"]  # the sample nearest the mean has 9 words
    assert planned.time.epoch_s == pytest.approx(planned.time.step_s * 4 / 3)
    without_data = plan_run(settings(tiny_model, **changes), gpu="RTX 4060")
    assert without_data.workload["data"] is None
    assert without_data.peak.allocated_bytes > planned.peak.allocated_bytes  # 512 tokens of text


def test_methods_are_compared_and_one_that_cannot_be_planned_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = plan_module.plan

    def no_full(config: TrainingConfig, *positional: Any, **named: Any) -> Any:
        if config.training.method.value == "full":
            raise UnsupportedModel("it can't", expected="one that can", next_step="take lora")
        return real(config, *positional, **named)

    monkeypatch.setattr(plan_module, "plan", no_full)
    configs = {
        method: TrainingConfig.model_validate(
            {"model": {"name": str(tiny_model)}, "training": {"method": method}, "data": {"image_size": 32}}
        )
        for method in ("full", "lora", "qlora")
    }
    compared = compare_as_json(configs, CARD)["compare"]
    assert compared["full"] == {"error": "it can't\n  expected: one that can\n  next: take lora"}
    assert compared["qlora"]["breakdown"]["4-bit weights"] > 0
    assert compared["lora"]["breakdown"]["4-bit weights"] == 0
    assert compared["qlora"] == plan_as_json(configs["qlora"], CARD)
    with pytest.raises(UnsupportedModel, match="it can't"):
        compare_as_json({"full": configs["full"]}, CARD)


def test_a_written_config_trains(eightgig: CommandLine) -> None:
    planned = eightgig("plan", str(eightgig.model), "--data", str(eightgig.data), *SMALL, "--write", "planned.yaml")
    assert planned.code == 0, planned.err
    assert planned.new == {"planned.yaml"}
    places = ("--set", "hardware.device=cpu", "--set", "hardware.mixed_precision=fp32", "--set", "data.num_workers=0")
    trained = eightgig("train", "planned.yaml", "--dry-run", "--run-folder", "run", *places)
    assert trained.code == 0, trained.err
    written = json.loads((eightgig.folder / "run" / "config.json").read_text())
    assert (written["data"]["data_path"], written["training"]["lora"]["rank"]) == (str(eightgig.data), 8)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["llava-1.5-7bb"], 5, ["no model is called 'llava-1.5-7bb'", "did you mean llava-1.5-7b"]),
        (["llava-1.5-7b", "--gpu", "RTX 4061"], 2, ["'RTX 4061'", "did you mean RTX 4060"]),
        (["./nothing"], 5, ["there is no folder ./nothing"]),
        (["empty"], 5, ["has no config.json (it holds README.md)"]),
        (["llava-1.5-7b", "--data", "gone.jsonl"], 3, ["gone.jsonl does not exist"]),
        (["llava-1.5-7b", "--set", "data.image_sice=9"], 2, ["data.image_sice", "unknown setting; did you mean "]),
        (["llava-1.5-7b", "--preset", "low_memry"], 2, ["did you mean low_memory?"]),
    ],
)
def test_a_mistake_says_what_to_do(arguments: list[str], code: int, said: list[str], eightgig: CommandLine) -> None:
    (eightgig.folder / "empty").mkdir()
    (eightgig.folder / "empty" / "README.md").touch()
    check_message(eightgig("plan", *arguments), code, *said)


def test_bad_data_ends_as_training_does(eightgig: CommandLine) -> None:
    records = [{"question": "q", "answer": "a"}] * 9 + [{"image": "gone.png", "question": "q", "answer": "a"}] * 2
    write_jsonl(eightgig.folder / "bad.jsonl", records)
    planned = eightgig("plan", str(eightgig.model), "--data", "bad.jsonl", *SMALL)
    trained = eightgig.train("--data", "bad.jsonl")
    check_message(planned, 3, "2 of 11 samples (18.2 %) can't be used", "missing_file")
    assert trained.code == 3

    def found(text: str) -> str:
        return text[text.index("error: ") : text.index("  next: ")]

    assert found(planned.err) == found(trained.err)
    listed = Path(planned.err.split("samples listed in ")[1].split(",")[0])
    assert [json.loads(line)["code"] for line in listed.read_text().splitlines()] == ["missing_file"] * 2
    shutil.rmtree(listed.parent)
