"""Whole runs of large models with the levers under 7.25 GiB: 50 steps, validation, checkpoints, a stop, a resume.

usage: python -m benchmarks.lever_training --work FOLDER --out RECORD.json [--only NAME ...] [--at-once 4]
           [--limit-s 540]

The settings of `benchmarks.levers_8gb`, through `eightgig train` in a fresh process, from real PNG and JSONL: two rows
of random letters that fill the length, each with a picture, over and over. Once a step behind the fiftieth is written,
the run is interrupted as Ctrl-C does it, and resumed in another fresh process to its end, where the result is saved and
proved. Runs share the card, so no times are compared.
"""

from __future__ import annotations

import argparse
import json
import signal
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from benchmarks.lever_runs import LeverRun
from benchmarks.levers_8gb import RUNS
from benchmarks.record import write_record
from PIL import Image

from eightgig.config import TrainingConfig
from eightgig.config.loading import save_config
from eightgig.plan.candidates import with_changes
from eightgig.plan.workload import QUESTION

NAMES = ("llava-13b-2048", "qwen-vl-chat-1024", "instructblip-7b-1024", "qwen3-vl-8b-1024")
INTERRUPTED_BEHIND, NUM_STEPS = 50, 56
COMMAND = (sys.executable, "-m", "eightgig", "train")
NUM_ROWS = 2
NUM_COMPARED = 10  # steps whose mean loss is taken at either end
SECONDS_BETWEEN_LOOKS = 0.1


def write_data(run: LeverRun, config: TrainingConfig, folder: Path) -> tuple[Path, Path]:
    """Training and validation rows, each with a picture of its own, and text that fills the length."""
    folder.mkdir(parents=True)
    side_px = run.image_px or run.spec.facts.image_px
    generator = np.random.default_rng(0)
    paths = []
    for name, num_rows in (("train", NUM_ROWS), ("val", 1)):
        rows = []
        for index in range(num_rows):
            picture = f"{name}-{index}.png"
            Image.fromarray(generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)).save(folder / picture)
            letters = generator.choice(list(string.ascii_lowercase), config.data.max_length)
            rows.append({"image": picture, "question": QUESTION, "answer": " ".join(letters)})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths[0], paths[1]


def config_of(run: LeverRun, folder: Path, device_type: str) -> TrainingConfig:
    """The settings of `run`, with its data in `folder`."""
    plain = run.config(device_type)
    train, validation = write_data(run, plain, folder)
    config = with_changes(
        plain,
        {
            "data.data_path": str(train),
            "data.val_path": str(validation),
            "data.num_workers": 1,
            "training.max_steps": NUM_STEPS,
            "validation.every_steps": INTERRUPTED_BEHIND // 2,
            "validation.num_generated": 1,
            "validation.max_new_tokens": 4,
            "checkpoints.every_steps": INTERRUPTED_BEHIND // 2,
        },
    )
    assert config is not None
    return config


def measure(run: LeverRun, work: Path, end: float, device_type: str = "cuda") -> dict[str, Any]:
    """The row of `run`; `error` in it where it ended badly. `end`: of the time there is, by `time.monotonic`."""
    folder, settings = work / run.name, work / f"{run.name}.yaml"
    save_config(config_of(run, work / f"{run.name}-data", device_type), settings)
    started = time.monotonic()
    first = _run([*COMMAND, str(settings), "--run-folder", str(folder)], work / f"{run.name}-first.log", end, folder)
    status = _facts(folder).get("status")
    if status != "interrupted":
        return {"name": run.name, "error": f"{status} and not interrupted: {first[-2000:]}"}
    second = _run([*COMMAND, "--resume", str(folder)], work / f"{run.name}-second.log", end, None)
    row = {"name": run.name, "model": run.model, "run_s": time.monotonic() - started}
    if _facts(folder).get("status") != "finished":
        return {**row, "error": f"not finished when it was resumed: {second[-2000:]}"}
    return {**row, **read_run(folder)}


def _run(command: list[str], log: Path, end: float, interrupts: Path | None) -> str:
    """Run `command` to its end, or until the run in the folder `interrupts` is far enough; what it printed."""
    print("+", *command, flush=True)
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        waits = interrupts is not None
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
            elif waits and interrupts is not None and _num_steps(interrupts) > INTERRUPTED_BEHIND:
                process.send_signal(signal.SIGINT)
                waits = False
            time.sleep(SECONDS_BETWEEN_LOOKS)
    return log.read_text()


def _num_steps(folder: Path) -> int:
    return len(_steps(folder)) if (folder / "metrics.jsonl").exists() else 0


def _steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in _records(lines) if record["kind"] == "step"]


def _records(lines: list[str]) -> list[dict[str, Any]]:
    """Whole lines; the last one may be in the middle of being written."""
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run wrote about itself."""
    steps, memory = _steps(folder), json.loads((folder / "memory.json").read_text())
    records = _records((folder / "metrics.jsonl").read_text().splitlines())
    losses = [step["loss"] for step in steps]
    verification = json.loads((folder / "verification.json").read_text())
    return {
        "steps": [step["step"] for step in steps],
        "losses": losses,
        "falls": fmean(losses[-NUM_COMPARED:]) < fmean(losses[:NUM_COMPARED]),
        "num_tokens": max(step["num_tokens"] for step in steps),
        "num_skipped_steps": sum(step["skipped"] for step in steps),
        "other_records": [record for record in records if record["kind"] != "step"],
        "memory": memory,
        "verified": verification["ok"],
        "verification_relative_difference": verification["relative_difference"],
    }


def main() -> None:
    """Run all, side by side, and write the record after each; end badly where a run did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--at-once", type=int, default=len(NAMES))
    parser.add_argument("--limit-s", type=float, default=540)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.limit_s
    runs = [run for run in RUNS if run.name in NAMES and (not arguments.only or run.name in arguments.only)]
    rows = json.loads(arguments.out.read_text())["figures"]["runs"] if arguments.out.exists() else []
    conditions = {"num_steps": NUM_STEPS, "interrupted_behind": INTERRUPTED_BEHIND, "at_once": arguments.at_once}

    lock = threading.Lock()

    def measured(run: LeverRun) -> None:
        row = measure(run, arguments.work, end)
        print({key: value for key, value in row.items() if key not in ("losses", "steps", "memory")}, flush=True)
        with lock:
            rows[:] = [*(other for other in rows if other["name"] != row["name"]), row]
            write_record(arguments.out, name="lever_training", figures={"runs": rows}, conditions=conditions)

    # A shell has what it puts into the background ignore it, and so do that one's own processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(measured, runs))
    failed = [row["name"] for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
