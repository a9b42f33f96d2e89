"""What a full disk, a power cut or a stray hand does to the files of a run, and what the next command says to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError
from tests.app.command_line import NOTHING, CommandLine, check_message
from tests.tiny import write_jsonl

from eightgig.app import finishing
from eightgig.app.training import train
from eightgig.checkpoint import store
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import verify_checkpoint
from eightgig.config import TrainingConfig
from eightgig.export.verify import Verification
from eightgig.train.events import SilentListener

MAX_STEPS = 6


# Paths to write to.
def taken(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "thesis.txt").write_text("mine")


@pytest.mark.parametrize(
    ("arrange", "arguments", "said"),
    [
        (taken, ["--run-folder", "there"], ["there exists already and is not empty", "another --run-folder"]),
        (lambda folder: (folder / "f").touch(), ["--run-folder", "f"], ["f is a file, not a folder"]),
        (lambda folder: (folder / "f").touch(), ["--run-folder", "f/run"], ["f/run can't be made", "f is a file"]),
        (lambda folder: (folder / "f").touch(), ["--output-dir", "f"], ["f", "can't be made", "f is a file"]),
        (lambda folder: None, ["--output-dir", "x" * 300], ["can't be made: File name too long", "a shorter name"]),
    ],
    ids=["taken", "a file", "below a file", "output below a file", "too long"],
)
def test_a_place_that_can_not_be_written_to(
    eightgig: CommandLine, arrange: Callable[[Path], object], arguments: list[str], said: list[str]
) -> None:
    arrange(eightgig.folder)
    before = eightgig.listing()
    ended = eightgig.train(*arguments)
    check_message(ended, 6, *said)
    assert eightgig.listing() - before - {"tiny.json"} == NOTHING


def test_a_folder_without_permission(eightgig: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbid)
    ended = eightgig.train("--output-dir", "theirs")
    check_message(ended, 6, "theirs", "can't be written: Permission denied", "choose another folder with --output-dir")
    assert ended.new - {"tiny.json"} == NOTHING


# A run that a power cut ended after step 5 of 6: checkpoints after steps 2 and 4.
class _Cut(SilentListener):
    def on_step(self, record: Any) -> None:
        if record["step"] == MAX_STEPS - 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut_run(tiny_config: Callable[..., TrainingConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut") / "run"
    config = tiny_config(training={"max_steps": MAX_STEPS}, validation={"num_generated": 0})
    with contextlib.suppress(KeyboardInterrupt):
        train(config, sources={}, run_folder=folder, listener=_Cut(), command="test")
    assert [path.name for path in checkpoint_paths(folder / "checkpoints")] == ["step-00000002", "step-00000004"]
    return folder


@pytest.fixture
def run(cut_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, and no proof in a fresh process at its end."""
    proof = Verification(0.0, 0.0, 0.0, None, ok=True, how="left out in this test")
    monkeypatch.setattr(finishing, "verify_in_fresh_process", lambda plan, reference: proof)
    return Path(shutil.copytree(cut_run, tmp_path / "run"))


def facts_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    return facts


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# Damage that does not keep a run from going on.
def damaged_newest_checkpoint(run: Path) -> None:
    weights = step_folder(run, 4) / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def cut_off_optimizer_state(run: Path) -> None:
    state = step_folder(run, 4) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])


def missing_optimizer_state(run: Path) -> None:
    (step_folder(run, 4) / "state.json").unlink()


def missing_manifest(run: Path) -> None:
    (step_folder(run, 4) / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_newest_checkpoint, "the content of adapter/adapter_model.safetensors was altered"),
        (cut_off_optimizer_state, "state.safetensors has"),
        (missing_optimizer_state, "state.json is missing"),
        (missing_manifest, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    eightgig: CommandLine, run: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(run)
    ended = eightgig("train", "--resume", "run")
    assert ended.code == 0, ended.err
    assert f"skipped: the checkpoint {Path('run/checkpoints/step-00000004')} is damaged: " in ended.err
    assert said in ended.err
    assert "going on at step 3" in ended.err
    assert steps_of(run) == list(range(1, MAX_STEPS + 1))
    verify_checkpoint(step_folder(run, 4))  # written anew


def test_a_half_written_last_line_of_the_log_is_left_out(eightgig: CommandLine, run: Path) -> None:
    for name in ("metrics.jsonl", "generations.jsonl"):
        with (run / name).open("ab") as stream:
            stream.write('{"kind": "step", "step": 6, "answer": "七'.encode()[:-1])  # in the middle of a letter
    ended = eightgig("train", "--resume", "run")
    assert ended.code == 0, ended.err
    assert steps_of(run) == list(range(1, MAX_STEPS + 1))
    assert facts_of(run)["status"] == "finished"


# Damage that does.
def no_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def every_checkpoint_damaged(run: Path) -> None:
    for step in (2, 4):
        (step_folder(run, step) / "state.json").write_text("{}")


def changed_setting(run: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    settings["training"]["learning_rate"] = 1e-3
    (run / "config.json").write_text(json.dumps(settings))


def unreadable_settings(run: Path) -> None:
    (run / "config.json").write_text('{"seed":')


def no_settings(run: Path) -> None:
    (run / "config.json").unlink()


def damaged_facts(run: Path) -> None:
    (run / "run.json").write_text('{"status": "run')


def damaged_best(run: Path) -> None:
    (run / "checkpoints" / "best.json").write_text("")


def damaged_log(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def finished(run: Path) -> None:
    (run / "run.json").write_text(json.dumps(facts_of(run) | {"status": "finished"}))


def checkpoint_of_another_version(run: Path) -> None:
    shutil.rmtree(step_folder(run, 2))
    manifest = json.loads((step_folder(run, 4) / "manifest.json").read_text())
    (step_folder(run, 4) / "manifest.json").write_text(json.dumps(manifest | {"format_version": 9}))


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (no_checkpoint, 7, ["checkpoints holds no usable checkpoint", "start the run anew"]),
        (every_checkpoint_damaged, 7, ["checkpoints holds no usable checkpoint", "start the run anew"]),
        (checkpoint_of_another_version, 7, ["holds no usable checkpoint", "start the run anew"]),
        (changed_setting, 7, ["was written with another configuration", "put back what was changed"]),
        (unreadable_settings, 2, ["config.json", "no valid JSON", "correct the syntax"]),
        (no_settings, 7, ["run holds no run (config.json is missing)", "`eightgig train` made"]),
        (damaged_facts, 7, ["run.json is damaged", "put the file back"]),
        (damaged_best, 7, ["best.json is damaged", "delete", "best.json and resume"]),
        (damaged_log, 7, ["metrics.jsonl is damaged: line 2 is no JSON", "delete line 2"]),
        (finished, 7, ["the run run is finished", "a run that was interrupted", "`eightgig predict run"]),
    ],
)
def test_what_keeps_a_run_from_going_on(
    eightgig: CommandLine, run: Path, damage: Callable[[Path], None], code: int, said: list[str]
) -> None:
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.json"}
    ended = eightgig("train", "--resume", "run")
    check_message(ended, code, *said)
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix != ".jsonl")


def test_an_empty_folder_is_no_run(eightgig: CommandLine) -> None:
    (eightgig.folder / "empty").mkdir()
    for verb in (["train", "--resume", "empty"], ["report", "empty"]):
        ended = eightgig(*verb)
        check_message(ended, 7, "empty holds no run (config.json is missing)", "give the folder that the run printed")
        assert ended.new == NOTHING


def test_other_data_than_before_is_refused(eightgig: CommandLine, run: Path) -> None:
    data = eightgig.folder / "data.jsonl"
    records = [json.loads(line) for line in eightgig.data.read_text().splitlines()]
    records = [record | {"image": str(eightgig.data.parent / record["image"])} for record in records]
    records[0]["conversations"][1]["value"] = "It is purple."
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["data_path"] = str(data)
    (run / "config.json").write_text(json.dumps(settings))
    ended = eightgig("train", "--resume", "run")
    check_message(ended, 7, "was written with another configuration and another training data", "put back what was")
    data.unlink()
    check_message(eightgig("train", "--resume", "run"), 3, "data.jsonl does not exist", "check the path")


def test_a_run_that_never_loaded_its_model_has_no_receipt(eightgig: CommandLine) -> None:
    record = json.loads(eightgig.data.read_text().splitlines()[0])
    write_jsonl(eightgig.folder / "d.jsonl", [record | {"image": "gone.png"}])
    assert eightgig.train("--data", "d.jsonl").code == 3
    check_message(eightgig("inspect", "run"), 7, "the run run has no receipt", "start it again")


# Adapters.
def missing_adapter(run: Path) -> str:
    return "run"


def interrupted_adapter(run: Path) -> Path:
    """The adapter of the last checkpoint: a whole one, by itself."""
    return Path(shutil.copytree(step_folder(run, 4) / "adapter", run.parent / "adapter"))


def adapter_without_weights(run: Path) -> str:
    (interrupted_adapter(run) / "adapter_model.safetensors").unlink()
    return "adapter"


def cut_off_adapter(run: Path) -> str:
    weights = interrupted_adapter(run) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    return "adapter"


def unreadable_adapter_settings(run: Path) -> str:
    (interrupted_adapter(run) / "adapter_config.json").write_text("{")
    return "adapter"


def adapter_of_another_model(run: Path) -> str:
    weights = interrupted_adapter(run) / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor.repeat(2, 2) for name, tensor in tensors.items()}, weights)
    return "adapter"


@pytest.mark.parametrize(
    ("arrange", "code", "said"),
    [
        (missing_adapter, 7, ["the run run has no result yet", "finish it with `eightgig train --resume run`"]),
        (adapter_without_weights, 7, ["adapter_model.safetensors can't be used: it is missing", "copy the adapter's"]),
        (cut_off_adapter, 7, ["adapter_model.safetensors can't be used", "copy the adapter's folder again"]),
        (unreadable_adapter_settings, 7, ["adapter_config.json can't be used", "copy the adapter's folder again"]),
        (adapter_of_another_model, 5, ["the adapter adapter does not fit the model", "leave --model out"]),
    ],
)
def test_an_adapter_that_can_not_be_used(
    eightgig: CommandLine, run: Path, arrange: Callable[[Path], str], code: int, said: list[str]
) -> None:
    target = arrange(run)
    check_message(eightgig("predict", target, "--question", "What?"), code, *said)


# A full disk.
def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_as_safetensors_says_it(*_: object, **__: object) -> None:
    raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")


@pytest.mark.parametrize(
    ("patched", "failure"),
    [
        ((store, "save_file"), full_as_safetensors_says_it),
        ((store, "save_file"), full),
        ((store, "write_json"), full),
        ((os, "fsync"), full),
    ],
    ids=["safetensors", "tensors", "manifest", "fsync"],
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    eightgig: CommandLine, run: Path, patched: tuple[Any, str], failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = (run / "metrics.jsonl").read_text()
    with monkeypatch.context() as context:
        context.setattr(*patched, failure)
        ended = eightgig("train", "--resume", "run")
    check_message(ended, 4, "the disk is full: writing", "enough free disk space", "free some space")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "step-00000004", "best.json"}
    verify_checkpoint(step_folder(run, 4))
    if patched[1] == "fsync":  # nothing at all could be written
        assert (run / "metrics.jsonl").read_text() == log
    ended = eightgig("train", "--resume", "run")  # there is room again
    assert ended.code == 0, ended.err
    assert steps_of(run) == list(range(1, MAX_STEPS + 1))


def test_a_file_over_the_systems_limit_is_explained(tmp_path: Path) -> None:
    """Not simulated: `ulimit -f` makes the system refuse what safetensors and the standard library write."""
    pytest.importorskip("resource")  # not on Windows
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from eightgig.core.files import whole_folder, write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from eightgig.core.errors import DoesNotFit\n"
        "def tensors():\n"
        "    with whole_folder(Path('checkpoint')) as folder:\n"
        "        save_file({'a': torch.zeros(100_000)}, folder / 'state.safetensors')\n"
        "for write in (tensors, lambda: write_bytes(Path('report.html'), bytes(100_000))):\n"
        "    try:\n"
        "        write()\n"
        "    except DoesNotFit as error:\n"
        "        print(error.found)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "checkpoint can't be written: File too large",
        "report.html can't be written: File too large",
    ], done.stderr
    assert list(tmp_path.iterdir()) == []
