"""What fits 8 GB (and 4 GB) with the memory levers, how fast, beside Unsloth and beside the same model all resident.

usage: python -m benchmarks.levers_8gb plan --out PLANS.json [--only NAME ...]                           (no GPU)
       python -m benchmarks.levers_8gb measure --plans PLANS.json --out RECORD.json [--only NAME ...] [--at-once 1]
           [--peer peer_step.py --make-checkpoint make_ckpt.py --peer-path FOLDER --work FOLDER] [--limit-s 520]

Full size, random weights. Each run in a process of its own, one after the other unless `--at-once` says more, for runs
whose times are not compared. What a call measures is written after each run and added to what the record holds already.

Memory counts as issue 5 has it: what the device shows as used, less the CUDA context after a first matrix product.
`moved_bytes` crossed PCIe in the last step: layer inputs, streamed weights, embeddings' rows and ids, the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from benchmarks.lever_runs import LeverRun, Planner, measure
from benchmarks.record import write_record

from eightgig.core.units import GIB
from eightgig.memory.segments import prefer_expandable_segments

CAP_GIB = 7.25
SMALL_CAP_GIB = 3.4
MAX_PINNED_BYTES = 7 * GIB
ALL_RESIDENT = {"cache_image_features": False}
LEAN = {"loss_chunk_tokens": 256, "cache_image_features": True, "embedding_on_host": True}

RUNS = (
    LeverRun("llava-7b-1024", "llava-1.5-7b", 1024, {**LEAN, "streamed_layers": 6}, CAP_GIB, 12),
    # Weights from RAM make room for layers that stay whole, which are computed once less.
    LeverRun(
        "llava-7b-1024-whole",
        "llava-1.5-7b",
        1024,
        {**LEAN, "streamed_layers": 32, "checkpointed_layers": 21},
        CAP_GIB,
        12,
    ),
    LeverRun("llava-7b-1024-resident", "llava-1.5-7b", 1024, ALL_RESIDENT, None, 12),
    LeverRun("llava-7b-1024-4gb", "llava-1.5-7b", 1024, {**LEAN, "streamed_layers": 18}, SMALL_CAP_GIB, 12),
    LeverRun(
        "llava-7b-24576",
        "llava-1.5-7b",
        24576,
        {
            **LEAN,
            "offload_layer_inputs": True,
            "mlp_tile_tokens": 4096,
            "tiled_projections": True,
            "streamed_layers": 8,
        },
        CAP_GIB,
        6,
    ),
    LeverRun(
        "qwen2.5-vl-7b-12288",
        "qwen2.5-vl-7b",
        12288,
        {**LEAN, "offload_layer_inputs": True, "mlp_tile_tokens": 2048, "streamed_layers": 8},
        CAP_GIB,
        6,
        image_px=336,
    ),
    LeverRun("llava-13b-2048", "llava-1.5-13b", 2048, {**LEAN, "streamed_layers": 16}, CAP_GIB, 12),
    LeverRun("llava-13b-2048-resident", "llava-1.5-13b", 2048, {"cache_image_features": True}, None, 12),
    LeverRun("qwen-vl-chat-1024", "qwen-vl-chat", 1024, LEAN, CAP_GIB, 50),
    LeverRun("instructblip-7b-1024", "instructblip-vicuna-7b", 1024, LEAN, CAP_GIB, 50),
    LeverRun("qwen3-vl-8b-1024", "qwen3-vl-8b", 1024, LEAN, CAP_GIB, 50, image_px=336),
)
PEERS = {"unsloth-llava-7b": ("llava-7b", "1024x1,12288x1"), "unsloth-qwen2.5-vl-7b": ("qwen2.5vl-7b", "4096x1")}
"""Name -> the checkpoint that `make_ckpt.py` makes, and the shapes: what is compared, and Unsloth's longest."""


class Record:
    """A record that grows; what it held before stays."""

    def __init__(self, path: Path, plans: Mapping[str, Mapping[str, Any]]) -> None:
        self._path = path
        self._plans = plans
        self._lock = threading.Lock()
        before = json.loads(path.read_text())["figures"] if path.exists() else {"runs": [], "peers": []}
        self.runs = {row["name"]: row for row in before["runs"]}
        self.peers = {(row["peer"], row.get("seq")): row for row in before["peers"]}

    def add_run(self, row: Mapping[str, Any]) -> None:
        """Add what a run took, beside its plan."""
        plan = self._plans[row["name"]]
        kinds = ("allocated_bytes", "reserved_bytes", "device_bytes")
        errors = {kind: plan[kind] / row[kind] - 1 for kind in kinds if kind in row}
        with self._lock:
            self.runs[row["name"]] = {**row, "planned": dict(plan), "planned_errors": errors}
            self._write()

    def add_peer(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add what a peer printed, a row a shape."""
        with self._lock:
            self.peers |= {(row["peer"], row.get("seq")): dict(row) for row in rows}
            self._write()

    def _write(self) -> None:
        figures = {
            "runs": list(self.runs.values()),
            "peers": list(self.peers.values()),
            "bars": bars(self.runs, {key: row for key, row in self.peers.items() if row.get("ok")}),
        }
        conditions = {"weights": "random, full size, NF4 with double quantisation", "rank": 16, "batch": 1}
        write_record(self._path, name="levers_8gb", figures=figures, conditions=conditions)


def bars(
    runs: Mapping[str, Mapping[str, Any]], peers: Mapping[tuple[str, int | None], Mapping[str, Any]]
) -> dict[str, Any]:
    """The bars of issue 5 that can be told from what was measured: the figures, and whether they hold."""
    ran = {name: row for name, row in runs.items() if not row.get("out_of_memory") and "error" not in row}
    told: dict[str, Any] = {}
    unsloth = peers.get(("unsloth-llava-7b", 1024))
    for name in ("llava-7b-1024", "llava-7b-1024-whole"):
        if name in ran and unsloth is not None:
            reserved = ran[name]["phases"]["train"]["reserved_bytes"] / GIB / unsloth["peak_reserved_GiB"]
            seconds = ran[name]["step_s"] / unsloth["step_s"]
            told[f"1 {name}"] = {
                "reserved_by_unsloth": reserved,
                "step_by_unsloth": seconds,
                "holds": reserved <= 0.90 and seconds <= 1.25,
            }
    for name, peer in (
        ("llava-7b-24576", ("unsloth-llava-7b", 12288)),
        ("qwen2.5-vl-7b-12288", ("unsloth-qwen2.5-vl-7b", 4096)),
    ):
        if name in ran and peer in peers:
            speed = ran[name]["tokens_per_s"] / peers[peer]["tok_s"]
            told[f"2 {name}"] = {
                "tokens_per_s_by_unsloth": speed,
                "holds": speed >= 0.5 and ran[name]["num_steps"] >= 5 and _is_within(ran[name]),
            }
    for label, name, resident, least in (
        ("3", "llava-13b-2048", "llava-13b-2048-resident", 0.6),
        ("4", "llava-7b-1024-4gb", "llava-7b-1024-resident", 0.4),
    ):
        if name in ran and resident in ran:
            speed = ran[name]["tokens_per_s"] / ran[resident]["tokens_per_s"]
            told[f"{label} {name}"] = {
                "tokens_per_s_by_resident": speed,
                "holds": speed >= least and _is_within(ran[name]),
            }
    for name in ("qwen-vl-chat-1024", "instructblip-7b-1024", "qwen3-vl-8b-1024"):
        if name in ran:
            first, last = ran[name]["losses"][0], ran[name]["losses"][-1]
            told[f"3 {name}"] = {
                "first_loss": first,
                "last_loss": last,
                "holds": last < first and ran[name]["num_steps"] >= 50 and _is_within(ran[name]),
            }
    return told


def _is_within(row: Mapping[str, Any]) -> bool:
    """Whether what was counted, and what was pinned, is within the run's limits."""
    cap_gib = row["planned"]["cap_gib"]
    return bool(row["counted_bytes"] <= cap_gib * GIB and row["pinned_bytes"] <= MAX_PINNED_BYTES)


def run_alone(run: LeverRun, timeout_s: float) -> dict[str, Any]:
    """The row of `run`, measured in a process of its own; `error` in it where that ended badly."""
    command = [sys.executable, "-m", "benchmarks.levers_8gb", "one", "--only", run.name]
    printed = output_of(command, timeout_s)
    found = [line.removeprefix("ROW ") for line in printed.splitlines() if line.startswith("ROW ")]
    row: dict[str, Any] = json.loads(found[-1]) if found else {"name": run.name, "error": printed[-2000:]}
    return row


def output_of(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> str:
    """What a command printed; what it had printed so far where its time was over."""
    print("+", *command, flush=True)
    try:
        process = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=None if environment is None else dict(environment),
            timeout=max(timeout_s, 1),
        )
    except subprocess.TimeoutExpired as expired:
        told = expired.stdout or b""
        return f"{told.decode() if isinstance(told, bytes) else told}\ncut off after {timeout_s:.0f} s"
    if process.returncode != 0:
        print(process.stdout[-3000:], flush=True)
    return process.stdout


def run_peer(name: str, arguments: argparse.Namespace, timeout_s: float) -> list[dict[str, Any]]:
    """What Unsloth took for the shapes of `name`, a row each."""
    checkpoint_name, shapes = PEERS[name]
    checkpoint = arguments.work / checkpoint_name
    environment = os.environ | {"PYTHONPATH": str(arguments.peer_path), "STEPS": "8"}
    started = time.perf_counter()
    if not checkpoint.exists():
        output_of(
            [sys.executable, str(arguments.make_checkpoint), checkpoint_name, str(checkpoint)], timeout_s, environment
        )
    left_s = timeout_s - (time.perf_counter() - started)
    command = [sys.executable, str(arguments.peer), "unsloth", str(checkpoint), shapes, str(CAP_GIB), "16"]
    printed = output_of(command, left_s, environment)
    found = [line.removeprefix("RESULT ") for line in printed.splitlines() if line.startswith("RESULT ")]
    rows = [{"peer": name, **json.loads(line)} for line in found]
    return rows or [{"peer": name, "ok": False, "err": printed[-2000:]}]


def measure_all(arguments: argparse.Namespace, record: Record) -> None:
    """Measure the chosen runs and peers, the record written after each; none begins when the time is over."""
    end = time.perf_counter() + arguments.limit_s

    def left_s() -> float:
        return end - time.perf_counter()

    for name in chosen(arguments.only, PEERS if arguments.peer else ()):
        if left_s() > 0:
            record.add_peer(run_peer(name, arguments, left_s()))

    def measured(run: LeverRun) -> None:
        if left_s() <= 0:
            print(f"{run.name}: no time left", flush=True)
            return
        row = {**run_alone(run, left_s()), "at_once": arguments.at_once}
        print({key: value for key, value in row.items() if key not in ("losses", "steps_s")}, flush=True)
        record.add_run(row)

    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]
    if arguments.at_once == 1:
        for run in runs:
            measured(run)
        return
    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(measured, runs))


def chosen(only: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of `names` that `only` names; all where it names nothing."""
    return [name for name in names if not only or name in only]


def main() -> None:
    """Plan, measure one in this process, or measure each in its own; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "measure", "one"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--make-checkpoint", type=Path)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--limit-s", type=float, default=520)
    arguments = parser.parse_args()
    prefer_expandable_segments()
    runs = [run for run in RUNS if not arguments.only or run.name in arguments.only]
    if arguments.what == "plan":
        planner, rows = Planner(), []
        for run in runs:
            rows.append(planner.plan(run))
            print({key: value for key, value in rows[-1].items() if key != "levers"}, flush=True)
            write_record(arguments.out, name="levers_8gb_plans", figures={"runs": rows}, conditions={})
        return
    if arguments.what == "one":
        (run,) = runs
        print("ROW " + json.dumps(measure(run, torch.device("cuda"))), flush=True)
        return
    plans = {row["name"]: row for row in json.loads(arguments.plans.read_text())["figures"]["runs"]}
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    measure_all(arguments, Record(arguments.out, plans))


if __name__ == "__main__":
    main()
