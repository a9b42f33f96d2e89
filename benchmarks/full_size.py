"""Registry models at full size with random weights through `eightgig train`: what a run takes of the GPU's memory.

usage: python -m benchmarks.full_size --work FOLDER --out RECORD.json [--only NAME ...] [--at-once 4] [--traces FOLDER]

Each run: a fresh process, real PNG and JSONL, one image of 336 px and a short answer a sample, 5 optimizer steps of one
sample, validation before and after, the adapter saved and proved in another fresh process. No cap on memory. Runs go
side by side where the driver tells processes apart, so their times are not comparable and are not recorded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.record import write_record
from PIL import Image

from eightgig.core.units import GIB

NUM_SAMPLES = 8
NUM_STEPS = 5
IMAGE_PX = 336
WORDS = ("a", "red", "cat", "on", "the", "table", "beside", "two", "books")


@dataclass(frozen=True)
class FullSizeRun:
    """One run: a registry model in one precision."""

    model: str
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """What the run's files are called."""
        return f"{self.model}-{self.precision}"


RUNS = (
    FullSizeRun("llava-1.5-13b"),
    FullSizeRun("qwen-vl-chat"),
    FullSizeRun("qwen2.5-vl-7b"),
    FullSizeRun("instructblip-vicuna-7b"),
    FullSizeRun("llava-1.5-7b"),
    FullSizeRun("qwen3-vl-8b"),
    FullSizeRun("qwen2.5-vl-7b", "fp16"),
    FullSizeRun("llava-1.5-7b", "fp16"),
    FullSizeRun("qwen3-vl-4b"),
    FullSizeRun("gemma-3-4b"),
    FullSizeRun("qwen2.5-vl-3b"),
    FullSizeRun("qwen3-vl-2b"),
    FullSizeRun("smolvlm2-2.2b"),
)


def write_data(folder: Path) -> Path:
    """JSONL with random pictures, a question and a short answer each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    records = []
    for index in range(NUM_SAMPLES):
        pixels = generator.integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        answer = " ".join(generator.choice(WORDS, 12))
        records.append({"image": f"{index}.png", "question": "What is shown?", "answer": answer})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_one(run: FullSizeRun, data: Path, work: Path, traces: Path | None) -> dict[str, Any]:
    """The row of `run`; `error` in it where it ended badly."""
    folder = work / run.name
    program = ["eightgig"] if traces is None else ["benchmarks.traced", str(traces / f"{run.name}.npz")]
    command = [sys.executable, "-m", *program, "train", "--model", run.model, "--random-weights", "0"]
    command += ["--data", str(data), "--run-folder", str(folder), "--max-steps", str(NUM_STEPS)]
    for setting in (
        f"hardware.mixed_precision={run.precision}",
        "hardware.checkpointed_layers=null",  # all, whatever room the card has
        "training.gradient_accumulation_steps=1",
        "data.val_fraction=0.25",
        "validation.num_generated=1",
        "validation.max_new_tokens=4",
        "data.num_workers=1",
    ):
        command += ["--set", setting]
    started = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"model": run.model, "precision": run.precision, "run_s": time.perf_counter() - started}
    print(f"{run.name}: status {process.returncode} after {row['run_s']:.0f} s", flush=True)
    if process.returncode != 0:
        print(process.stdout[-1500:], process.stderr[-3000:], flush=True)
        return row | {"error": (process.stderr or process.stdout)[-2000:]}
    return row | read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """What the run in `folder` wrote about itself."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    memory = json.loads((folder / "memory.json").read_text())
    verification = json.loads((folder / "verification.json").read_text())
    return {
        "losses": [record["loss"] for record in records if record["kind"] == "step"],
        "grad_norms": [record["grad_norm"] for record in records if record["kind"] == "step"],
        "num_skipped_steps": sum(record["skipped"] for record in records if record["kind"] == "step"),
        "num_tokens_a_step": max(record["num_tokens"] for record in records if record["kind"] == "step"),
        "peak_allocated_gib": memory["peak_allocated_bytes"] / GIB,
        "peak_reserved_gib": memory["peak_reserved_bytes"] / GIB,
        "device_used_gib": memory["device_used_bytes"] / GIB,
        "counts_other_programs": memory["counts_other_programs"],
        "phases": memory["phases"],
        "categories": memory["categories"],
        "verified": verification["ok"],
        "verification_relative_difference": verification["relative_difference"],
    }


def main() -> None:
    """Run all, write the record, end badly where a run did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--traces", type=Path)
    arguments = parser.parse_args()
    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]
    data = write_data(arguments.work / "data")
    with ThreadPoolExecutor(arguments.at_once) as pool:
        rows = list(pool.map(lambda run: run_one(run, data, arguments.work, arguments.traces), runs))
    conditions = {
        "weights": "random, full size, NF4 with double quantisation",
        "preset": "ultra_low_memory, but micro-batches of a step: 1",
        "num_steps": NUM_STEPS,
        "image_px": IMAGE_PX,
        "at_once": arguments.at_once,
    }
    figures = {"runs": sorted(rows, key=lambda row: (row["model"], row["precision"]))}
    write_record(arguments.out, name="full_size", figures=figures, conditions=conditions)
    failed = [f"{row['model']}-{row['precision']}" for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
