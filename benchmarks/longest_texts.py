"""Whether the longest text that the planner says fits runs under the cap, and one 5 % longer runs out of memory.

usage: python -m benchmarks.longest_texts plan --out PLANS.json                                      (no GPU)
       python -m benchmarks.longest_texts measure --plans PLANS.json --work FOLDER --out RECORD.json

Each length runs through `eightgig train` in a fresh process under the allocator's cap, as `benchmarks.planned_runs`
does it, with validation before and after, over NUM_STEPS steps: a little above what fits, PyTorch gives back what it
holds unused a dozen times a step, and it takes some steps until there is no room left that way either.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.planned_runs import CARD, CARD_BUDGET_GIB, CardShare, PlannedRun, planning_pool
from benchmarks.planned_runs import measure as measure_run
from benchmarks.record import write_record
from benchmarks.search_accuracy import Pair

from eightgig import registry
from eightgig.core.units import GIB
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.candidates import Candidates
from eightgig.plan.search import longest_fit
from eightgig.plan.workload import largest_workload
from eightgig.registry.gpus import get_gpu

PAIRS = (
    Pair("llava-1.5-7b", 7.25),
    Pair("llava-1.5-7b", 8.5),
    Pair("llava-1.5-7b", 11.0),
    Pair("qwen3-vl-2b", 3.5),
    Pair("qwen3-vl-2b", 5.0),
    Pair("qwen3-vl-2b", 7.25),
)
LENGTHS = range(1024, 18 * 1024, 16)
LONGER = 1.05
NUM_STEPS = 24
OUT_OF_MEMORY = "out of memory"


def run_of(pair: Pair, length: int) -> PlannedRun:
    """The run of one text of `length` tokens at a time."""
    settings = {"data.max_length": length, "hardware.cap_gib": pair.cap_gib}
    name = f"{pair.model}-{pair.cap_gib:g}-{length}"
    return PlannedRun(name, pair.model, settings, preset="ultra_low_memory", num_steps=NUM_STEPS)


def plan_pair(pair: Pair) -> dict[str, Any]:
    """The longest text that the planner says fits."""
    card, spec = get_gpu(CARD), registry.get(pair.model)
    config = run_of(pair, LENGTHS[0]).config()
    candidates = Candidates(
        config,
        spec,
        card,
        card.vram_bytes,
        lambda variant: largest_workload(variant, spec),
        None,
        validates=True,
    )

    def fits(length: int) -> bool:
        found = candidates.get({"data.max_length": length})
        return found is not None and bool(found.fits)

    row = {"model": pair.model, "cap_gib": pair.cap_gib, "longest_tokens": longest_fit(LENGTHS, fits)}
    print(row, flush=True)
    return row


def measure_length(pair: Pair, length: int, work: Path, share: CardShare) -> dict[str, Any]:
    """What came of one text of `length` tokens a step."""
    measured = measure_run(run_of(pair, length), work, share, round(pair.cap_gib * GIB) + CONTEXT_BYTES)
    return {
        "model": pair.model,
        "cap_gib": pair.cap_gib,
        "tokens": length,
        "ran": "error" not in measured,
        "ran_out_of_memory": OUT_OF_MEMORY in measured.get("error", "").lower(),
        "error": measured.get("error"),
        "reserved_bytes": measured.get("reserved_bytes"),
        "allocated_bytes": measured.get("allocated_bytes"),
    }


def main() -> None:
    """Plan or measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["plan", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--card-gib", type=float, default=CARD_BUDGET_GIB, help="for all runs side by side")
    arguments = parser.parse_args()
    if arguments.what == "plan":
        with planning_pool(len(PAIRS)) as pool:
            pairs = list(pool.map(plan_pair, PAIRS))
        write_record(arguments.out, name="longest_plans", figures={"pairs": pairs}, conditions={"card": CARD})
        return
    plans = json.loads(arguments.plans.read_text())["figures"]["pairs"]
    share = CardShare(round(arguments.card_gib * GIB))
    lengths = [
        (Pair(plan["model"], plan["cap_gib"]), length)
        for plan in plans
        for length in (plan["longest_tokens"], int(plan["longest_tokens"] * LONGER))
    ]
    with ThreadPoolExecutor(len(lengths)) as pool:
        measured = list(pool.map(lambda each: measure_length(*each, arguments.work, share), lengths))
    rows = [
        {**plan, "longest_run": measured[2 * index], "longer_run": measured[2 * index + 1]}
        for index, plan in enumerate(plans)
    ]
    write_record(
        arguments.out,
        name="longest_texts",
        figures={"pairs": rows},
        conditions={"longer": LONGER, "num_steps": NUM_STEPS},
    )


if __name__ == "__main__":
    main()
