"""A run that is asked to stop finishes its step, saves, and goes on later as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.app.command_line import CommandLine
from tests.app.listening import Listener

from eightgig.app import finishing
from eightgig.app.training import resume, train
from eightgig.checkpoint import store
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import verify_checkpoint
from eightgig.cli.plain_progress import PlainListener
from eightgig.config import TrainingConfig
from eightgig.export.verify import Verification
from eightgig.train import validation
from eightgig.train.events import RunOutcome
from eightgig.train.stopping import STOPPING, RunStopped, heeding_signals

Train = Callable[..., RunOutcome]
MakeConfig = Callable[..., TrainingConfig]
NOT_PROVED = Verification(0.0, 0.0, 0.0, None, ok=True, how="left out in this test")
UNEQUAL = ("_s", "_bytes")  # ends of the names of times and memory


class Sending(Listener):
    """Sends this process `signals` when the step `at` was logged."""

    def __init__(self, at: int, *signals: int) -> None:
        super().__init__()
        self.at = at
        self.signals = signals

    def on_step(self, record: Any) -> None:
        if record["step"] == self.at:
            send(*self.signals)


def send(*signals: int) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


def steps_saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_paths(run / "checkpoints")]


def facts(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "run.json").read_text())
    return read


def numbers(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(UNEQUAL)} for line in lines]


def check_equal(whole: Path, stopped: Path) -> None:
    for name in ("metrics.jsonl", "generations.jsonl"):
        assert numbers(stopped / name) == numbers(whole / name)
    best = Path("checkpoints") / "best.json"
    assert (stopped / best).read_text() == (whole / best).read_text()
    expected, found = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, stopped))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def config(tiny_config: MakeConfig) -> TrainingConfig:
    return tiny_config(training={"lora": {"rank": 4, "dropout": 0.2}})


@pytest.fixture(scope="module")
def whole(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that config which nothing stopped."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(finishing, "verify_in_fresh_process", lambda plan, reference: NOT_PROVED)
        return train(config, run_folder=tmp_path_factory.mktemp("whole") / "run").run_folder


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Signals as a process has them at its start, and as they were again after each test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "at", "num_workers"), [(signal.SIGINT, 3, 0), (signal.SIGTERM, 4, 2)])
def test_a_stopped_run_saves_its_step_and_goes_on_as_if_it_had_not(
    whole: Path,
    config: TrainingConfig,
    run_training: Train,
    tmp_path: Path,
    number: signal.Signals,
    at: int,
    num_workers: int,
) -> None:
    """Step 4 is one that is validated and saved anyway: the validation is left for later."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": num_workers})})
    listener = Sending(at, number)
    with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name} after step {at}") as caught:
        run_training(config, name="stopped", listener=listener)
    run = tmp_path / "stopped"
    assert isinstance(caught.value, RunStopped)
    assert caught.value.signal_number == number
    assert listener.texts.count(STOPPING) == 1
    assert steps_saved(run)[-1] == at
    assert facts(run)["status"] == "interrupted"
    assert facts(run)["reason"] == f"stopped by {number.name} after step {at}"
    assert [record["step"] for record in numbers(run / "metrics.jsonl")] == list(range(at + 1))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (run / "run.lock").exists()
    resume(run)
    check_equal(whole, run)


def test_a_second_signal_stops_at_once(tiny_config: MakeConfig, run_training: Train, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="at once"):
        run_training(tiny_config(), listener=Sending(3, signal.SIGINT, signal.SIGINT))
    assert steps_saved(tmp_path / "run") == [2]
    assert facts(tmp_path / "run")["status"] == "interrupted"


def test_a_second_signal_in_a_checkpoints_write_leaves_the_one_before(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = store.save_file

    def interrupted(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        if "step-00000004" in str(path):
            send(signal.SIGTERM, signal.SIGTERM)

    monkeypatch.setattr(store, "save_file", interrupted)
    with pytest.raises(RunStopped, match="SIGTERM at once"):
        run_training(tiny_config())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000002", "best.json"}
    verify_checkpoint(checkpoints / "step-00000002")


def send_in_validation(monkeypatch: pytest.MonkeyPatch, number_of_call: int) -> None:
    """Have this process get SIGINT in the given validation of those to come."""
    left = number_of_call
    compute = validation.validation_loss

    def interrupted(*arguments: Any) -> float:
        nonlocal left
        left -= 1
        loss = compute(*arguments)
        if left == 0:
            send(signal.SIGINT)
        return loss

    monkeypatch.setattr(validation, "validation_loss", interrupted)


def test_a_validation_is_cut_short_and_done_when_the_run_goes_on(
    whole: Path, config: TrainingConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_validation(monkeypatch, 2)  # after that before training: the one at step 4
    listener = Listener()
    with pytest.raises(RunStopped, match="after step 4"):
        run_training(config, listener=listener)
    run = tmp_path / "run"
    assert steps_saved(run) == [2, 4]
    assert "the validation was cut short: it is done first when the run goes on" in listener.texts
    assert [record["step"] for record in numbers(run / "metrics.jsonl") if record["kind"] == "validation"] == [0]
    resume(run)
    check_equal(whole, run)


def test_a_run_stopped_in_its_first_validation_leaves_nothing(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_validation(monkeypatch, 1)
    with pytest.raises(RunStopped, match="after step 0"):
        run_training(tiny_config())
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    whole: Path, config: TrainingConfig, run_training: Train, tmp_path: Path
) -> None:
    with pytest.raises(RunStopped, match="at once"):
        run_training(config, listener=Sending(1, signal.SIGTERM, signal.SIGTERM))
    run = tmp_path / "run"
    assert steps_saved(run) == []
    listener = Listener()
    resume(run, listener=listener)
    assert "the run ended before its first checkpoint was written: it begins again at step 1" in listener.texts
    check_equal(whole, run)


def test_while_the_model_is_loaded_the_first_signal_stops_and_leaves_nothing(
    tiny_config: MakeConfig, run_training: Train, tmp_path: Path
) -> None:
    class AtLoading(Listener):
        def on_message(self, text: str) -> None:
            if text.startswith("loading"):
                send(signal.SIGTERM)

    with pytest.raises(RunStopped, match="SIGTERM at once"):
        run_training(tiny_config(), listener=AtLoading())
    assert not (tmp_path / "run").exists()


def test_ignored_signals_and_handlers_of_the_caller_stay(tiny_config: MakeConfig, run_training: Train) -> None:
    got: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `command &`
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    outcome = run_training(tiny_config(), listener=Sending(1, signal.SIGINT, signal.SIGTERM))
    assert outcome.steps_done == 6
    assert got == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_off_the_main_thread_no_handler_is_set() -> None:
    seen: list[Any] = []

    def act() -> None:
        with heeding_signals(print) as stop:
            seen.extend([stop.is_asked, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert seen == [False, signal.default_int_handler]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers can't tell who sent a signal")
def test_data_workers_outlive_signals_that_were_sent_to_all(tiny_config: MakeConfig, run_training: Train) -> None:
    """As a terminal sends Ctrl-C, and a batch system SIGTERM: from elsewhere, and to every process of the command."""
    told: list[int] = []

    class ToWorkers(Listener):
        def on_step(self, record: Any) -> None:
            for worker in multiprocessing.active_children():
                told.append(worker.pid or 0)
                # From another process than the parent, whose word a worker takes.
                os.system(f"kill -INT {worker.pid}; kill -TERM {worker.pid}")

    outcome = run_training(tiny_config(data={"num_workers": 2}), listener=ToWorkers())
    assert outcome.steps_done == 6
    assert len(set(told)) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(
    eightgig: CommandLine, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    settings = eightgig.folder / "tiny.json"
    values: dict[str, Any] = {"model": {"name": str(eightgig.model)}, "data": {"data_path": str(eightgig.data)}}
    values |= {"hardware": {"device": "cpu", "mixed_precision": "fp32"}}
    settings.write_text(json.dumps(values | {"training": {"max_steps": 5, "gradient_accumulation_steps": 1}}))
    monkeypatch.setattr(PlainListener, "on_step", lambda self, record: send(number) if record["step"] == 2 else None)
    ended = eightgig("train", "tiny.json", "--run-folder", "run", "--set", "data.num_workers=0")
    assert ended.code == code
    assert STOPPING in ended.err
    assert "checkpoint run/checkpoints/step-00000002 (the run is stopped)" in ended.err
    assert ended.err.endswith("next: go on from the last checkpoint with `eightgig train --resume run`\n")
    assert steps_saved(eightgig.folder / "run") == [2]
