"""Which levers a plan chooses for models that don't fit a small card without, and what they are planned to take.

usage: python -m benchmarks.chosen_levers --out RECORD.json                                             (no GPU)

Each is one call of `eightgig plan` with preset ultra_low_memory, nothing kept from earlier calls; `plan_s` is the time
of the call on this machine. Memory is simulated at full size, times are estimates from data sheets; of a card of which
only the memory is known there are none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

from eightgig.config.levers import Levers

RTX_4060, FOUR_GIB = ("--gpu", "RTX 4060"), ("--vram-gib", "4.15")
LENGTHS = (512, 1024, 2048)  # tokens of text; those of one image come on top
MODELS = ("qwen-vl-chat", "instructblip-7b", "qwen3-vl-8b", "llava-1.5-13b")
RUNS = (
    ("llava-1.5-7b", RTX_4060, 512),
    *((model, RTX_4060, length) for model in MODELS for length in LENGTHS),
    ("llava-1.5-7b", FOUR_GIB, 1024),
)


def row(model: str, card: tuple[str, str], max_length: int) -> dict[str, Any]:
    """What the plan of one run says."""
    command = [sys.executable, "-m", "eightgig", "plan", model, *card, "--set", f"data.max_length={max_length}"]
    started = time.perf_counter()
    process = subprocess.run([*command, "--no-cache", "--json"], capture_output=True, text=True, check=True)
    plan_s = time.perf_counter() - started
    planned = json.loads(process.stdout)
    plain, hardware = asdict(Levers()), planned["config"]["hardware"]
    told = {
        "model": model,
        "card": planned["gpu"],
        "max_length": max_length,
        "num_tokens": planned["workload"]["num_tokens"],
        "batch_size": planned["config"]["training"]["batch_size"],
        "levers": {name: hardware[name] for name in plain if hardware[name] != plain[name]},
        "fits": planned["fits"],
        "device_bytes": planned["peak"]["device_bytes"],
        "budget_bytes": planned["budget_bytes"],
        "host_bytes": planned["host_bytes"],
        "step_s": None if planned["time"] is None else planned["time"]["step_s"],
        "plan_s": plan_s,
    }
    print(told, flush=True)
    return told


def main() -> None:
    """Plan each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row(*run) for run in RUNS]
    conditions = {"preset": "ultra_low_memory", "runs": [[model, *card, length] for model, card, length in RUNS]}
    write_record(arguments.out, name="chosen_levers", figures={"rows": rows}, conditions=conditions)


if __name__ == "__main__":
    main()
