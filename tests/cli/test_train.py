"""`eightgig train`: what `app` is given, and what is printed where."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_events import Calls, run, run_outcome

from eightgig.config import TrainingConfig


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """`app.training.train` that ends at once."""
    calls = Calls(monkeypatch)
    calls.answer("training", "train", lambda **_: run_outcome(Path("runs/a")))
    return calls


def config_of(calls: Calls) -> TrainingConfig:
    """The configuration that `app` was given."""
    config = calls.arguments["positional"][0]
    assert isinstance(config, TrainingConfig)
    return config


def test_flags_win_over_file_over_preset_over_defaults(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "my.yaml"
    settings.write_text("training:\n  num_epochs: 7\n  learning_rate: 0.0003\n  lora: {rank: 12, alpha: 24}\n")
    flags = ["--preset", "low_memory", "--set", "training.lora.rank=64", "--max-steps", "5", "--model", "eightgig-demo"]
    assert run(capsys, "train", "my.yaml", *flags)[0] == 0
    config, sources = config_of(calls), calls.arguments["sources"]
    for value, source, wanted, origin in (
        (config.training.lora and config.training.lora.rank, "training.lora.rank", 64, "flag --set"),
        (config.training.max_steps, "training.max_steps", 5, "flag --max-steps"),
        (config.model.name, "model.name", "eightgig-demo", "flag --model"),
        (config.training.lora and config.training.lora.alpha, "training.lora.alpha", 24, "file my.yaml"),
        (config.training.learning_rate, "training.learning_rate", 0.0003, "file my.yaml"),
        (config.data.max_length, "data.max_length", 1024, "preset low_memory"),
        (config.training.weight_decay, "training.weight_decay", 0.0, "default"),
    ):
        assert (value, sources[source]) == (wanted, origin)


def test_every_flag_reaches_its_setting(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "d.jsonl", "--val", "v.jsonl", "--image-root", "img", "--output-dir", "out"]
    flags += ["--random-weights", "3", "--cap-gib", "7.25", "--run-folder", "here", "--dry-run"]
    flags += ["--no-rehearsal"]
    assert run(capsys, "train", *flags)[0] == 0
    config = config_of(calls)
    assert (config.data.data_path, config.data.val_path) == (Path("d.jsonl"), Path("v.jsonl"))
    assert (config.data.image_root, config.output_dir) == (Path("img"), Path("out"))
    assert (config.model.random_weights_seed, config.hardware.cap_gib) == (3, 7.25)
    assert (calls.arguments["run_folder"], calls.arguments["dry_run"]) == (Path("here"), True)
    assert config.hardware.rehearsal is False
    assert run(capsys, "train")[0] == 0
    assert config_of(calls).hardware.rehearsal is True


def test_the_command_is_kept_as_it_can_be_typed_again(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/eightgig", "train", "--data", "my data.jsonl"])
    run(capsys, "train", "--data", "my data.jsonl")
    assert calls.arguments["command"] == "eightgig train --data 'my data.jsonl'"


@pytest.mark.parametrize(
    ("arguments", "is_said"),
    [
        ([], True),
        (["--data", "d.jsonl"], True),
        (["--preset", "balanced"], False),
        (["balanced"], False),
        (["--set", "preset=balanced"], False),
        (["my.json"], False),
    ],
)
def test_the_preset_that_nobody_chose_is_said(
    arguments: list[str], is_said: bool, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.json").write_text("{}")
    code, out, err = run(capsys, "train", *arguments)
    assert code == 0
    assert ("using preset ultra_low_memory" in err) is is_said
    assert "ultra_low_memory" not in out
    wanted = "ultra_low_memory" if is_said else {"my.json": None}.get(arguments[0], "balanced")
    assert config_of(calls).preset == wanted


def test_results_are_on_stdout(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", "--preset", "balanced") == (
        0,
        "status        finished after 400 steps, 30 min 34 s\n"
        "final loss    0.1538\n"
        "exact match   0 % before, 87.5 % after training\n"
        "peak memory   5.40 GiB reserved on the GPU\n"
        "reloaded      the saved adapter gives the same logits in a fresh process (largest difference 0.0125)\n"
        f"adapter       {Path('runs/a/adapter')}\n"
        f"report        {Path('runs/a/report.html')}\n"
        f"run folder    {Path('runs/a')}\n",
        "",
    )


def test_a_dry_run_prints_only_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("adapter_folder", "report_path", "final_loss", "exact_match_before", "exact_match_after", "verification")
    )
    changes = nothing | {"status": "dry run", "steps_done": 0, "train_s": 0.0, "peak": {"host_peak_rss_bytes": 1 << 30}}
    Calls(monkeypatch).answer("training", "train", lambda **_: run_outcome(Path("runs/a"), **changes))
    _, out, _ = run(capsys, "train", "--preset", "balanced", "--dry-run")
    assert out == (
        f"status        dry run after 0 steps, 0.0 s\npeak memory   1.00 GiB RAM\nrun folder    {Path('runs/a')}\n"
    )


def test_an_adapter_that_reloads_differently_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verification = {"ok": False, "max_abs_difference": 3.5}
    outcome = run_outcome(Path("runs/a"), verification=verification)
    Calls(monkeypatch).answer("training", "train", lambda **_: outcome)
    assert "reloaded      NOT THE SAME: the saved adapter's logits differ by 3.5" in run(capsys, "train")[1]


def test_only_the_first_of_several_processes_prints(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train") == (0, "", "")


def test_resume_goes_on_with_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = Calls(monkeypatch)
    calls.answer("training", "resume", lambda **_: run_outcome(Path("runs/a")))
    code, out, err = run(capsys, "train", "--resume", "runs/a")
    assert (code, err) == (0, "")
    assert calls.arguments["positional"] == (Path("runs/a"),)
    assert "finished after 400 steps" in out


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["my.yaml"], "PRESET|FILE = my.yaml"),
        (["--model", "x", "--max-steps", "5"], "--max-steps = 5"),
        (["--set", "seed=1"], "--set = seed=1"),
        (["--dry-run"], "--dry-run = True"),
        (["--run-folder", "b"], "--run-folder = b"),
        (["--preset", "full"], "--preset = full"),
    ],
)
def test_resume_stands_alone(others: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "--resume", "runs/a", *others)
    assert (code, out) == (2, "")
    assert f"{said}: not together with --resume" in err


@pytest.mark.parametrize("assignment", ["training.lora.rank", "=8", ""])
def test_a_setting_without_a_value_is_explained(assignment: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", "--set", assignment)
    assert code == 2
    assert f"--set = {assignment}: PATH=VALUE, such as training.lora.rank=16" in err


def test_config_show_prints_values_sources_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "config", "show", "ultra_low_memory", "--set", "training.learning_rate=1e-4")
    assert (code, err) == (0, "")
    assert out.startswith(
        "preset ultra_low_memory: QLoRA of a 7B model in the least memory\nmade for cards of 8 GB (RTX 4060"
    )
    lines = out.splitlines()
    rank = next(index for index, line in enumerate(lines) if line.startswith("  rank = 8 "))
    assert lines[rank].split() == ["rank", "=", "8", "preset", "ultra_low_memory"]
    assert "20 M trainable weights" in lines[rank + 1]
    assert "  learning_rate = 0.0001                     flag --set" in lines
    assert max(map(len, lines)) <= 80


def test_config_show_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("preset: balanced\ndata: {data_path: a.jsonl}\n")
    values = json.loads(run(capsys, "config", "show", "my.yaml", "--json")[1])
    assert values["training.method"]["value"] == "qlora"
    assert values["data.data_path"] == values["data.data_path"] | {"value": "a.jsonl", "source": "file my.yaml"}
    assert values["data.val_path"]["value"] is None
    assert values["training.batch_size"]["value"] == 2
    assert values["training.batch_size"]["source"] == "preset balanced"


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(run(capsys, "config", "schema")[1])
    assert {"model", "training", "data", "hardware"} <= schema["properties"].keys()
