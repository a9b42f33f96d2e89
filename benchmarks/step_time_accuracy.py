"""What the planner says of the steps that `benchmarks/step_time.py` measured on a GPU, on a machine without one.

usage: python -m benchmarks.step_time_accuracy --out RECORD.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from benchmarks.step_time import RUNS, StepRun

from eightgig.models.precision import DTYPES, Precision
from eightgig.plan.card_rates import CardRates, attained
from eightgig.plan.simulate import Simulation, Simulator
from eightgig.plan.step_time import device_seconds, issue_seconds, planned_time
from eightgig.plan.workload import largest_workload
from eightgig.registry import resolve

MEASURED = Path(__file__).parent / "results" / "step_time.json"
H100 = (9, 0)
BINDING_SHARE = 0.85  # of a step: where the GPU computes for longer, the step is bound by it


def simulated(run: StepRun) -> Simulation:
    """The run's two steps, simulated without validation."""
    config, spec = run.config("cuda"), resolve(run.model)
    mixed = config.hardware.mixed_precision
    precision = Precision(compute_dtype=DTYPES[mixed], mixed_precision=mixed, note=None)
    work = largest_workload(config, spec)
    return Simulator(config, spec, work.processor, precision, H100).run(config, work, validates=False)


def predict(run: StepRun, row: Mapping[str, Any], rates: CardRates) -> dict[str, Any]:
    """The planned step beside the measured `row`."""
    started = time.perf_counter()
    costs = simulated(run)
    train, update = costs.micro_batch_costs, costs.update_costs
    num_micro_batches = run.accumulation
    planned = planned_time(
        train,
        update,
        rates,
        num_micro_batches=num_micro_batches,
        num_tokens=row["num_tokens"],
    )
    device_s = num_micro_batches * device_seconds(train, rates) + device_seconds(update, rates)
    kernels_s = row["profile"]["kernels_s"]
    names = ("model", "method", "precision", "checkpointing", "batch_size", "accumulation", "num_tokens")
    return {name: row[name] for name in names} | {
        "planned_device_s": device_s,
        "planned_issue_s": num_micro_batches * issue_seconds(train, rates) + issue_seconds(update, rates),
        "kernels_s": kernels_s,
        "device_error": device_s / kernels_s - 1,
        "planned_step_s": planned.step_s,
        "step_s": row["step_s"],
        "step_error": planned.step_s / row["step_s"] - 1,
        "gpu_binds": kernels_s >= BINDING_SHARE * row["step_s"],
        "planning_s": time.perf_counter() - started,
    }


def main() -> None:
    """Plan every measured run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    measured = json.loads(MEASURED.read_text())
    rates, card = attained()
    rows = [predict(run, row, rates) for run, row in zip(RUNS, measured["figures"]["runs"], strict=True)]
    bound = [row["step_error"] for row in rows if row["gpu_binds"]]
    figures = {
        "runs": rows,
        "worst_device_error": max((row["device_error"] for row in rows), key=abs),
        "worst_step_error_where_the_gpu_binds": max(bound, key=abs),
        "worst_step_error": max((row["step_error"] for row in rows), key=abs),
    }
    conditions = {
        "measured": measured["commit"],
        "measured_with": measured["versions"],
        "on": measured["device"],
        "rates_of": card.name,
        "binding_share": BINDING_SHARE,
    }
    write_record(arguments.out, name="step_time_accuracy", figures=figures, conditions=conditions)


if __name__ == "__main__":
    main()
