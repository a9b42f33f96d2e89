#!/usr/bin/env python3
"""One training run, killed again and again with SIGKILL and resumed each time, compared with one that was left alone.

usage: python -m benchmarks.crash_harness --kills 100 --out benchmarks/results/crash_harness_cpu.json

By default the run is of the embedded demo model. Some kills come at a random moment of the training, some of the
loading, some just before a random change of the run's files (found by Python's audit events: a file opened for writing,
moved, removed, a folder made). After each, every checkpoint that can be seen must verify, and none that retention keeps
may be missing. At the end the adapter, every checkpoint, the log (but for times and memory), the answers and the note
of the best step must be those of the run that was left alone, byte for byte.

Each attempt is a process of its own, forked from one that has imported everything: the import takes longer than all the
rest, and a kill in it touches no file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.record import write_record

from eightgig.app.demonstration import demo_config
from eightgig.app.training import resume, train
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import verify_checkpoint
from eightgig.config import TrainingConfig, load_config
from eightgig.core.errors import CheckpointError
from eightgig.demo.charts import write_task
from eightgig.train.events import SilentListener

SETTINGS = {
    "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "lora": {"rank": 8, "dropout": 0.1}},
    "data": {"num_workers": 2},
    "validation": {"every_steps": 10, "num_generated": 2},
    "checkpoints": {"every_steps": 2, "keep_last": 2},
}
"""Of the demo model's run: all that draws random numbers, more than one worker, epochs that end between checkpoints."""
NUM_TRAIN_IMAGES, NUM_TEST_IMAGES = 46, 6
AIMS = ("moment", "file", "file", "moment", "loading")
"""In turn: what each kill is aimed at."""
STEPS_A_KILL = 3
"""More than a kill lets pass on average, so that the run is not over before the last one."""
NUM_INTERVALS = 2.0  # a kill comes within so many intervals between checkpoints from the start of the training
FILE_CHANGES_AN_INTERVAL = 25  # about: two log lines, five files of a checkpoint and the removal of an old one
RESULT = Path("adapter") / "adapter_model.safetensors"
UNEQUAL = ("_s", "_bytes")  # ends of the names of what differs between equal runs


@dataclass(frozen=True)
class Kill:
    """One kill: what it was aimed at, and what stood on the disk afterwards."""

    aim: str
    after_s: float
    checkpoints: tuple[str, ...]
    is_sound: bool
    is_complete: bool


class _Told(SilentListener):
    """Tells the parent when the training starts; from then on a change of a file in `folder` may be the last."""

    def __init__(self, pipe: int, folder: Path, dies_before_change: int | None) -> None:
        self._pipe = pipe
        if dies_before_change is not None:
            self._left = dies_before_change
            self._folder = str(folder)
            self._is_started = False
            sys.addaudithook(self._count)

    def on_start(self, start: Any) -> None:
        self._is_started = True
        os.write(self._pipe, b"s")

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        changes = changes or (event == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)))
        if self._is_started and changes and self._folder in str(arguments[0]):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _fork(act: Callable[[int], object]) -> tuple[int, int]:
    """A process that calls `act` with a pipe's writing end: its id, and the reading end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        code = 1
        try:
            act(writing)
            code = 0
        except BaseException:  # noqa: BLE001 - the process ends here, whatever it is
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    return process, reading


def _wait_until_start(pipe: int, timeout_s: float) -> bool:
    """Whether the training started within `timeout_s`; the pipe's end, when the process has ended, counts as such."""
    return bool(select.select([pipe], [], [], timeout_s)[0])


def attempt(config: TrainingConfig, folder: Path, aim: str, draw: random.Random, timing: Mapping[str, float]) -> Any:
    """Begin or go on with the run in `folder` and kill it; seconds until the kill, or None where the run ended itself.

    Raises:
        RuntimeError: the run failed.
    """
    dies_before = None
    if aim == "file":
        dies_before = draw.randint(1, int(NUM_INTERVALS * FILE_CHANGES_AN_INTERVAL))

    def act(pipe: int) -> None:
        told = _Told(pipe, folder, dies_before)
        if (folder / "config.json").is_file() and (folder / "run.json").is_file():
            resume(folder, listener=told)
        else:
            train(config, run_folder=folder, listener=told)

    began_s = time.monotonic()
    process, pipe = _fork(act)
    if aim == "loading":
        has_started = _wait_until_start(pipe, draw.uniform(0, timing["loading_s"]))
    else:
        has_started = _wait_until_start(pipe, 3600.0)
    if aim == "moment" and has_started:
        time.sleep(draw.uniform(0, NUM_INTERVALS * timing["interval_s"]))
    if aim != "file":
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    os.close(pipe)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return time.monotonic() - began_s
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the run ended with status {os.WEXITSTATUS(status)} instead of being killed")
    return None


def _look(folder: Path, before: set[str], keep_last: int) -> tuple[tuple[str, ...], bool, bool]:
    """The checkpoints in `folder`, whether all are sound, and whether all that must be there are."""
    paths = checkpoint_paths(folder / "checkpoints")
    is_sound = True
    for path in paths:
        try:
            verify_checkpoint(path)
        except (CheckpointError, OSError) as error:
            print(f"  unreadable: {error}", flush=True)
            is_sound = False
    names = tuple(path.name for path in paths)
    must_be_there = set(sorted(before | set(names))[-keep_last:])
    return names, is_sound, must_be_there <= set(names)


def _numbers(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith(UNEQUAL)} for line in lines]


def differences(whole: Path, killed: Path) -> list[str]:
    """What of the run in `killed` is not as in `whole`, by name."""
    differing = [str(RESULT)] if (whole / RESULT).read_bytes() != (killed / RESULT).read_bytes() else []
    for name in ("metrics.jsonl", "generations.jsonl"):
        if _numbers(whole / name) != _numbers(killed / name):
            differing.append(name)
    best = Path("checkpoints") / "best.json"
    if (whole / best).read_text() != (killed / best).read_text():
        differing.append(str(best))
    files = [
        {path.name: verify_checkpoint(path)["files"] for path in checkpoint_paths(run / "checkpoints")}
        for run in (whole, killed)
    ]
    if files[0] != files[1]:
        differing.append("checkpoints")
    left = [path for path in killed.rglob(".*") if path.name.endswith((".partial", ".deleted"))]
    return differing + [str(path.relative_to(killed)) for path in left]


def _time_whole_run(config: TrainingConfig, folder: Path) -> dict[str, float]:
    """Train into `folder` undisturbed; how long its loading and its intervals between checkpoints took."""
    times: dict[str, float] = {}
    began_s = time.monotonic()
    process, pipe = _fork(lambda writing: train(config, run_folder=folder, listener=_Told(writing, folder, None)))
    _wait_until_start(pipe, 3600.0)
    times["loading_s"] = time.monotonic() - began_s
    status = os.waitpid(process, 0)[1]
    os.close(pipe)
    if status != 0:
        raise RuntimeError("the run that was to be left alone failed")
    steps = [
        record["step_s"]
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "step"
    ]
    return times | {"interval_s": sum(steps) / len(steps) * config.checkpoints.every_steps}


def _demo_run(work: Path, num_kills: int) -> TrainingConfig:
    files = write_task(work / "data", seed=0, num_train_images=NUM_TRAIN_IMAGES, num_test_images=NUM_TEST_IMAGES)
    settings = demo_config(files, output_dir=work, seed=0).model_dump(mode="json")
    for section, values in SETTINGS.items():
        settings[section] |= values
    settings["training"]["max_steps"] = STEPS_A_KILL * num_kills
    return TrainingConfig.model_validate(settings)


def main() -> int:
    """Run it all; 1 where anything was lost or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON")
    parser.add_argument("--work", type=Path, default=Path("crash-harness"), help="folder for data and runs, made anew")
    parser.add_argument("--config", type=Path, help="settings of another run than the demo model's")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    given = arguments.config
    config = load_config(given).config if given is not None else _demo_run(arguments.work, arguments.kills)
    timing = _time_whole_run(config, arguments.work / "whole")
    print(f"left alone: {json.dumps(timing)}", flush=True)
    kills, folder = _kill_again_and_again(arguments, config, timing), arguments.work / "killed"
    process, pipe = _fork(lambda writing: resume(folder, listener=_Told(writing, folder, None)))
    has_ended_well = os.waitpid(process, 0)[1] == 0
    os.close(pipe)
    differing = differences(arguments.work / "whole", folder) if has_ended_well else ["the run did not end"]
    figures = {
        "num_kills": len(kills),
        "num_kills_by_aim": {aim: sum(kill.aim == aim for kill in kills) for aim in sorted(set(AIMS))},
        "num_after_which_a_checkpoint_was_unreadable": sum(not kill.is_sound for kill in kills),
        "num_after_which_a_checkpoint_was_lost": sum(not kill.is_complete for kill in kills),
        "differing": differing,
        "timing": timing,
        "kills": [asdict(kill) for kill in kills],
    }
    conditions = {"model": config.model.name, "steps": config.training.max_steps, "seed": arguments.seed}
    write_record(arguments.out, name="crash harness", figures=figures, conditions=conditions)
    print(json.dumps({key: value for key, value in figures.items() if key != "kills"}, indent=2), flush=True)
    is_well = len(kills) == arguments.kills and all(kill.is_sound and kill.is_complete for kill in kills)
    return 0 if is_well and not differing else 1


def _kill_again_and_again(
    arguments: argparse.Namespace, config: TrainingConfig, timing: Mapping[str, float]
) -> list[Kill]:
    draw = random.Random(arguments.seed)
    folder = arguments.work / "killed"
    kills: list[Kill] = []
    there: set[str] = set()
    while len(kills) < arguments.kills:
        aim = AIMS[len(kills) % len(AIMS)]
        after_s = attempt(config, folder, aim, draw, timing)
        if after_s is None:
            print(f"the run ended after {len(kills)} kills", flush=True)
            break
        names, is_sound, is_complete = _look(folder, there, config.checkpoints.keep_last)
        there = set(names)
        kills.append(Kill(aim, round(after_s, 3), names, is_sound, is_complete))
        print(f"kill {len(kills)} ({aim}) after {after_s:.2f} s: {names[-1] if names else 'no checkpoint'}", flush=True)
    return kills


if __name__ == "__main__":
    sys.exit(main())
