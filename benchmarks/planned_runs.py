"""Runs of many kinds through `eightgig train` on a GPU, beside what the planner said of each before.

usage: python -m benchmarks.planned_runs predict --out RECORD.json [--only NAME ...]      (no GPU)
       python -m benchmarks.planned_runs measure --plans RECORD.json --work FOLDER --out RECORD.json [--part PART]
       python -m benchmarks.planned_runs compare --measured RECORD.json ... --before RECORD.json ... --out RECORD.json

Each run: full size, random weights, a fresh process, real PNG and JSONL, 3 optimizer steps, validation with an answer
before and after, the result saved and proved in another fresh process. Every micro-batch is the largest that the
settings let through, except where lengths are mixed. Runs go side by side as far as the card's memory allows.

The blind runs were written down and planned before any run of the list was measured (docs/decisions/0005-planner.md):
results/planned_runs_before.json. What they showed went into the planner, so that they are blind no more; the runs of
BLIND_AGAIN were then written down, planned and committed (results/planned_runs_before_again.json) before one of them
was measured. `compare` plans every measured run with the code and the packages as they are and sets it beside those.

results/planned_runs_measured_*.json are records of `measure` less two things: runs that ended in an error (seven, whose
settings the command refused; they were measured again), and the plans, of which only the size that the runs were put
side by side by was real. The runs of BUILT_WITH_PRESET were started without naming settings, so they had this preset's;
their pictures were of the model's own size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.planned_comparison import comparison_row, figures_of, read_measured, sources
from benchmarks.record import write_record
from PIL import Image

from eightgig import registry
from eightgig.config import TrainingConfig
from eightgig.config.levers import Levers
from eightgig.config.loading import resolve, save_config
from eightgig.core.units import GIB
from eightgig.plan.plan import plan
from eightgig.plan.workload import QUESTION, WORD
from eightgig.registry.gpus import get_gpu

NUM_STEPS = 3
CARD = "H100 SXM"
CARD_BUDGET_GIB = 72.0  # of 79, for all runs side by side
# The last layer of LLaVA's tower is not used: its features are those of the last but one.
LLAVA_TOWER_TOO = (
    r".*(language_model|vision_tower.*layers\.(\d|1\d|2[0-2])\.).*"
    r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
)
TOWER_TOO = r".*\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv|fc1|fc2|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class PlannedRun:
    """One run: a model and what differs from the settings of `preset` (None: from the defaults).

    `mixes_lengths`: from 30 % of the longest text. `num_steps`: optimizer steps.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    mixes_lengths: bool = False
    preset: str | None = None
    num_steps: int = NUM_STEPS

    def config(self) -> TrainingConfig:
        """Its settings."""
        return resolve(self.preset, self.assignments()).config

    def assignments(self) -> dict[str, str]:
        """What `--set` is given."""
        fixed = {
            "model.name": self.model,
            "model.random_weights_seed": 0,
            "training.gradient_accumulation_steps": 1,
            "training.lora.rank": 8,
            "training.lora.alpha": 16,
            "validation.num_generated": 1,
            "validation.max_new_tokens": 4,
            "data.num_workers": 1,
            # No lever is left to the run's own plan: what is measured is what was planned.
            **{f"hardware.{name}": value for name, value in asdict(Levers()).items()},
        }
        if self.settings.get("training.method") == "full":
            fixed = {key: value for key, value in fixed.items() if "lora" not in key}
        return {
            key: json.dumps(value) if not isinstance(value, str) else value
            for key, value in (fixed | dict(self.settings)).items()
        }


def _run(name: str, model: str, mixes_lengths: bool = False, **settings: Any) -> PlannedRun:
    """`settings` by their last names."""
    places = {
        "length": "data.max_length",
        "px": "data.image_size",
        "batch": "training.batch_size",
        "accumulation": "training.gradient_accumulation_steps",
        "rank": "training.lora.rank",
        "dropout": "training.lora.dropout",
        "targets": "training.lora.target_modules",
        "method": "training.method",
        "optimizer": "training.optimizer",
        "checkpointing": "hardware.gradient_checkpointing",
        "precision": "hardware.mixed_precision",
    }
    return PlannedRun(name, model, {places[key]: value for key, value in settings.items()}, mixes_lengths)


BUILT_WITH_PRESET = (
    _run("llava-7b-256", "llava-1.5-7b", length=256),
    _run("llava-7b-512-batch-4", "llava-1.5-7b", batch=4),
    _run("llava-7b-2048-mixed", "llava-1.5-7b", True, length=2048, batch=2, accumulation=2),
    _run("llava-7b-fp16-rank-64", "llava-1.5-7b", precision="fp16", rank=64),
    _run("llava-13b-512", "llava-1.5-13b"),
    _run("instructblip-512", "instructblip-vicuna-7b", rank=16),
    _run("qwen-vl-chat-1024", "qwen-vl-chat", length=1024),
    _run("qwen2.5-vl-7b-1024", "qwen2.5-vl-7b", length=1024, px=672),
    _run("qwen2.5-vl-3b-4096", "qwen2.5-vl-3b", length=4096, px=448),
    _run("qwen2.5-vl-3b-batch-4", "qwen2.5-vl-3b", batch=4, px=448, rank=32),
    _run("qwen2-vl-2b-1024", "qwen2-vl-2b", length=1024, px=448),
    _run("qwen3-vl-4b-2048", "qwen3-vl-4b", length=2048, px=448, accumulation=2),
    _run("qwen3.5-2b-512", "qwen3.5-2b", px=448),
    _run("gemma-3-4b-1024", "gemma-3-4b", length=1024),
    _run("gemma-3-4b-fp16-batch-2", "gemma-3-4b", precision="fp16", batch=2),
    _run("smolvlm2-2.2b-2048", "smolvlm2-2.2b", length=2048),
    _run("internvl3.5-2b-512", "internvl3.5-2b"),
    _run("llava-onevision-0.5b-512", "llava-onevision-0.5b", batch=2),
    _run("paligemma2-3b-224-512", "paligemma2-3b-224", batch=2),
    _run("llama-3.2-11b-512", "llama-3.2-11b-vision"),
    _run("gemma-4-e2b-512", "gemma-4-e2b"),
)

BUILT = (
    *(replace(run, preset="ultra_low_memory") for run in BUILT_WITH_PRESET),
    _run("llava-7b-512-whole", "llava-1.5-7b", checkpointing=False),
    _run("llava-7b-tower", "llava-1.5-7b", targets=LLAVA_TOWER_TOO, rank=16),
    _run("llava-7b-lora-16bit", "llava-1.5-7b", method="lora", batch=2),
    _run("qwen3-vl-2b-full", "qwen3-vl-2b", method="full", px=448),
    _run("qwen3-vl-2b-whole-batch-4", "qwen3-vl-2b", checkpointing=False, batch=4, px=448),
    _run("smolvlm-256m-full", "smolvlm-256m", method="full", batch=2),
    _run("smolvlm2-500m-lora", "smolvlm2-500m", method="lora", dropout=0.05, checkpointing=False),
)

BLIND = (
    _run("blind-llava-7b-8192", "llava-1.5-7b", length=8192 - 576),
    _run("blind-llava-7b-batch-8", "llava-1.5-7b", batch=8, length=256, rank=4),
    _run("blind-llava-7b-rank-128-paged", "llava-1.5-7b", rank=128, optimizer="paged_adamw_8bit"),
    _run("blind-llava-13b-fp16-1024", "llava-1.5-13b", precision="fp16", length=1024, dropout=0.1),
    _run("blind-instructblip-batch-4", "instructblip-vicuna-7b", batch=4, length=256),
    _run("blind-qwen-vl-chat-whole", "qwen-vl-chat", checkpointing=False, length=256),
    _run("blind-qwen2.5-vl-7b-batch-4-mixed", "qwen2.5-vl-7b", True, batch=4, length=768, px=560, accumulation=2),
    _run("blind-qwen2.5-vl-7b-tower", "qwen2.5-vl-7b", targets=TOWER_TOO, px=448),
    _run("blind-qwen2-vl-7b-512", "qwen2-vl-7b", px=672),
    _run("blind-qwen3-vl-8b-4096", "qwen3-vl-8b", length=4096, px=512),
    _run("blind-qwen3-vl-2b-batch-8", "qwen3-vl-2b", batch=8, px=448, rank=16),
    _run("blind-qwen2.5-vl-3b-lora-adamw", "qwen2.5-vl-3b", method="lora", optimizer="adamw", px=448),
    _run("blind-gemma-3-4b-2048-mixed", "gemma-3-4b", True, length=2048, accumulation=4),
    _run("blind-smolvlm2-2.2b-whole-batch-2", "smolvlm2-2.2b", checkpointing=False, batch=2),
    _run("blind-smolvlm-500m-full-fp16", "smolvlm-500m", method="full", precision="fp16"),
    _run("blind-internvl3.5-1b-1024", "internvl3.5-1b", length=1024, rank=64),
)

BLIND_AGAIN = (
    _run("again-llava-7b-2048-batch-2", "llava-1.5-7b", length=2048, batch=2, rank=32),
    _run("again-llava-7b-1024-mixed", "llava-1.5-7b", True, length=1024, batch=2, accumulation=2),
    _run("again-llava-7b-whole-fp16", "llava-1.5-7b", checkpointing=False, precision="fp16", length=256),
    _run("again-llava-13b-2048", "llava-1.5-13b", length=2048, rank=16),
    _run("again-instructblip-whole-batch-2", "instructblip-vicuna-7b", checkpointing=False, length=256, batch=2),
    _run("again-qwen-vl-chat-512-batch-2", "qwen-vl-chat", batch=2, rank=64),
    _run("again-qwen2.5-vl-7b-2048-fp16", "qwen2.5-vl-7b", precision="fp16", length=2048, px=448),
    _run("again-qwen2.5-vl-3b-full", "qwen2.5-vl-3b", method="full", px=448),
    _run("again-qwen2-vl-7b-rank-64-adamw", "qwen2-vl-7b", rank=64, optimizer="adamw", px=448),
    _run("again-qwen2-vl-2b-lora-whole", "qwen2-vl-2b", method="lora", checkpointing=False, px=560, batch=2),
    _run("again-qwen3-vl-8b-batch-4", "qwen3-vl-8b", batch=4, px=448, length=256),
    _run("again-qwen3-vl-4b-tower", "qwen3-vl-4b", targets=TOWER_TOO, px=448),
    _run("again-qwen3-vl-2b-8192", "qwen3-vl-2b", length=7936, px=512),
    _run("again-qwen3.5-2b-1024-mixed", "qwen3.5-2b", True, length=1024, px=448, accumulation=2),
    _run("again-gemma-3-4b-512-batch-4", "gemma-3-4b", batch=4),
    _run("again-gemma-4-e2b-2048", "gemma-4-e2b", length=2048),
    _run("again-smolvlm2-2.2b-rank-128", "smolvlm2-2.2b", rank=128, length=1024),
    _run("again-internvl3.5-1b-full", "internvl3.5-1b", method="full", length=256),
    _run("again-internvl3.5-2b-2048-batch-2", "internvl3.5-2b", length=2048, batch=2),
    _run("again-llava-onevision-0.5b-lora", "llava-onevision-0.5b", method="lora", length=1024),
    _run("again-paligemma2-3b-1024", "paligemma2-3b-224", length=1024, dropout=0.05),
    _run("again-llama-3.2-11b-1024", "llama-3.2-11b-vision", length=1024, rank=32),
)

PARTS = {"built": BUILT, "blind": BLIND, "blind_again": BLIND_AGAIN}


def predict(run: PlannedRun) -> dict[str, Any]:
    """What the planner says of `run` on the card."""
    started = time.perf_counter()
    config = run.config()
    planned = plan(config, registry.get(run.model), get_gpu(CARD), reserve_bytes=0)
    peak = planned.peak
    return {
        "name": run.name,
        "model": run.model,
        "preset": run.preset,
        "settings": dict(run.settings),
        "mixes_lengths": run.mixes_lengths,
        "num_tokens": planned.workload["num_tokens"],
        "allocated_bytes": peak.allocated_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "device_bytes": peak.device_bytes,
        "moment": peak.moment,
        "planning_s": time.perf_counter() - started,
    }


def write_data(run: PlannedRun, folder: Path) -> tuple[Path, Path]:
    """Training and validation samples of `run`: square random pictures, texts that fill `data.max_length`."""
    folder.mkdir(parents=True)
    config = run.config()
    side_px = config.data.image_size or registry.get(run.model).facts.image_px
    generator = np.random.default_rng(0)
    batch = config.training.batch_size
    num_samples = batch * config.training.gradient_accumulation_steps * run.num_steps
    lengths = [config.data.max_length] * num_samples
    if run.mixes_lengths:
        lengths[1:] = [int(length * generator.uniform(0.3, 1.0)) for length in lengths[1:]]
    for index in range(2):
        pixels = generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    paths = []
    for name, sizes in (("train", lengths), ("val", [config.data.max_length] * batch)):
        rows = [
            {"image": f"{i % 2}.png", "question": QUESTION, "answer": (WORD * size).strip()}
            for i, size in enumerate(sizes)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
    return paths[0], paths[1]


class CardShare:
    """Lets runs begin only as far as the memory planned for them fits on the card together."""

    def __init__(self, budget_bytes: int) -> None:
        self._free_bytes = budget_bytes
        self._changed = threading.Condition()

    def take(self, size_bytes: int) -> None:
        """Wait until `size_bytes` are free, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free_bytes >= size_bytes)
            self._free_bytes -= size_bytes

    def give(self, size_bytes: int) -> None:
        """Give them back."""
        with self._changed:
            self._free_bytes += size_bytes
            self._changed.notify_all()


def measure(run: PlannedRun, work: Path, share: CardShare, planned_bytes: int) -> dict[str, Any]:
    """The row of `run`; `error` in it where it ended badly."""
    train, validation = write_data(run, work / f"{run.name}-data")
    folder = work / run.name
    settings = work / f"{run.name}.yaml"
    save_config(run.config(), settings)
    command = [sys.executable, "-m", "eightgig", "train", str(settings), "--data", str(train)]
    command += ["--run-folder", str(folder), "--set", f"data.val_path={validation}", "--max-steps", str(run.num_steps)]
    share.take(planned_bytes)
    started = time.perf_counter()
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        share.give(planned_bytes)
    run_s = time.perf_counter() - started
    print(f"{run.name}: status {process.returncode} after {run_s:.0f} s", flush=True)
    if process.returncode != 0:
        print(process.stdout[-600:], process.stderr[-1500:], flush=True)
    if not (folder / "memory.json").exists():
        return {"name": run.name, "run_s": run_s, "error": (process.stderr or process.stdout)[-2000:]}
    return {"name": run.name, "run_s": run_s, "status": process.returncode, **read_run(folder)}


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run took, read from its folder."""
    memory = json.loads((folder / "memory.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    return {
        "allocated_bytes": memory["peak_allocated_bytes"],
        "reserved_bytes": memory["peak_reserved_bytes"],
        "device_bytes": memory["device_used_bytes"],
        "counts_other_programs": memory["counts_other_programs"],
        "phases": memory["phases"],
        "num_tokens": max(record["num_tokens"] for record in steps),
        "losses": [record["loss"] for record in steps],
    }


def planning_pool(num_processes: int) -> ProcessPoolExecutor:
    """Processes that plan side by side; spawned, since torch's threads don't survive a fork."""
    return ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"))


def compare(
    runs: Sequence[PlannedRun], measured: Sequence[Path], before: Sequence[Path], out: Path, num_processes: int
) -> None:
    """Plan each of `runs` that was measured, and write the record of both."""
    taken = read_measured(measured)
    said_before = {row["name"]: row for path in before for row in json.loads(path.read_text())["figures"]["runs"]}
    part_of = {run.name: part for part, runs_of_part in PARTS.items() for run in runs_of_part}
    rows = []
    with planning_pool(num_processes) as pool:
        for planned in pool.map(predict, [run for run in runs if run.name in taken]):
            name = planned["name"]
            rows.append(comparison_row(planned, taken[name], part_of[name], said_before.get(name)))
            print(name, {kind: f"{error:+.2%}" for kind, error in rows[-1]["errors"].items()}, flush=True)
    conditions = {"card": CARD, "num_steps": NUM_STEPS, "measured": sources(measured), "before": sources(before)}
    write_record(out, name="planned_runs", figures=figures_of(rows), conditions=conditions)


def main() -> None:
    """Plan, measure or compare, write the record, end badly where a run did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["predict", "measure", "compare"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--at-once", type=int, default=8, help="runs side by side, or plans made by as many processes")
    parser.add_argument("--card-gib", type=float, default=CARD_BUDGET_GIB, help="for all runs side by side")
    parser.add_argument("--measured", type=Path, nargs="+")
    parser.add_argument("--before", type=Path, nargs="+")
    arguments = parser.parse_args()
    chosen = [run for part in PARTS if arguments.part in (None, part) for run in PARTS[part]]
    runs = [run for run in chosen if not arguments.only or run.name in arguments.only]
    if arguments.what == "compare":
        compare(runs, arguments.measured, arguments.before, arguments.out, arguments.at_once)
        return
    if arguments.what == "predict":
        with planning_pool(arguments.at_once) as pool:
            rows = list(pool.map(predict, runs))
        write_record(arguments.out, name="planned_runs_before", figures={"runs": rows}, conditions={"card": CARD})
        return
    plans = {row["name"]: row for row in json.loads(arguments.plans.read_text())["figures"]["runs"]}
    share = CardShare(round(arguments.card_gib * GIB))
    with ThreadPoolExecutor(arguments.at_once) as pool:
        measured = list(
            pool.map(lambda run: measure(run, arguments.work, share, plans[run.name]["device_bytes"]), runs)
        )
    rows = [{"name": row["name"], "measured": row} for row in measured if "error" not in row]
    conditions = {"num_steps": NUM_STEPS, "at_once": arguments.at_once, "part": arguments.part}
    write_record(arguments.out, name="planned_runs_measured", figures={"runs": rows}, conditions=conditions)
    failed = [row["name"] for row in measured if "error" in row]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
