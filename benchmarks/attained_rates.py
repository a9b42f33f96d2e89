"""Write `src/eightgig/plan/attained_rates.json`: what the GPU of a record of `benchmarks/step_time.py` attains.

usage: python -m benchmarks.attained_rates

Rates come from the record's single kernels, those that `eightgig.plan.card_rates` times on a card at hand. The CPU's
time for an operation comes from the runs of FITTED, which it limits; no other run is used. What an empty kernel takes
differs by a tenth from machine to machine with the same card: it is the median of the record's and those of AT_HAND.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.step_time import RUNS, StepRun
from benchmarks.step_time_accuracy import simulated

from eightgig.plan import card_rates
from eightgig.plan.card_rates import CardRates, attention_flops, rates_as_json
from eightgig.registry.gpus import get_gpu

RECORD = Path(__file__).parent / "results" / "step_time.json"
AT_HAND = Path(__file__).parent / "results" / "rates_at_hand.json"  # by benchmarks/rates_at_hand.py
OUT = Path(card_rates.__file__).parent / "attained_rates.json"
FITTED = (0, 4)  # of RUNS: one sample with and without checkpointing, whose kernels take a third of the step


def rates_from(record: Mapping[str, Any], dispatch_s: float) -> CardRates:
    """The rates of the kernels in `record`, beside the CPU's time for an operation."""
    kernels = record["figures"]["kernels"]
    launches = kernels["launches"]
    attention = _row(
        kernels["attention"],
        **dict(zip(("batch", "heads", "length", "width"), card_rates.ATTENTION_SHAPE, strict=True)),
        mask=False,
        causal=True,
    )
    copy = _row(kernels["host_copies"], pinned=True, bytes=card_rates.COPIED_BYTES)
    return CardRates(
        product_flop_per_s=_product_rate(kernels, card_rates.PRODUCTS, "torch.bfloat16", "nt"),
        fp32_product_flop_per_s=_product_rate(kernels, [card_rates.FP32_PRODUCT], "torch.float32", "nn"),
        attention_flop_per_s=attention_flops() / attention["forward_s"],
        attention_backward_flop_per_s=attention_flops() * 5 / 2 / attention["backward_s"],
        bytes_per_s=_byte_rate(kernels),
        transfer_bytes_per_s=copy["bytes"] / copy["s"],
        kernel_s=statistics.median([launches["kernel_s"], *_kernel_seconds_at_hand()]),
        issue_s=launches["issue_s"],
        dispatch_s=dispatch_s,
        basis=card_rates.MEASURED,
    )


def _kernel_seconds_at_hand() -> list[float]:
    return [rates["kernel_s"] for rates in json.loads(AT_HAND.read_text())["figures"]["rates"]]


def _row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with the values `wanted`; for those of the adapters there are equal ones, of which the first."""
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def _product_rate(kernels: Mapping[str, Any], sizes: Any, dtype: str, layout: str) -> float:
    rows = [_row(kernels["products"], m=m, n=n, k=k, dtype=dtype, layout=layout) for m, n, k in sizes]
    return sum(2 * row["m"] * row["n"] * row["k"] for row in rows) / sum(row["s"] for row in rows)


def _byte_rate(kernels: Mapping[str, Any]) -> float:
    rows = [
        _row(kernels["memory_bound"], op=name, moved_bytes=num_bytes * card_rates.NUM_ELEMENTS)
        for name, (num_bytes, _, _) in card_rates.ELEMENTWISE.items()
    ]
    return sum(row["moved_bytes"] for row in rows) / sum(row["s"] for row in rows)


def fitted_dispatch_s(record: Mapping[str, Any]) -> float:
    """The mean over the runs of FITTED."""
    return statistics.mean(_dispatch_s(RUNS[index], record["figures"]["runs"][index]) for index in FITTED)


def _dispatch_s(run: StepRun, row: Mapping[str, Any]) -> float:
    """The CPU's time for each operation that launches kernels, in forward and backward pass of a run it limits."""
    issue_s = statistics.median(step["issue_s"] for step in row["steps"])
    return issue_s / (run.accumulation * sum(simulated(run).micro_batch_costs.values()))


def main() -> None:
    """Write the file."""
    record = json.loads(RECORD.read_text())
    source = f"benchmarks/results/{RECORD.name}, commit {record['commit']}, {record['date']}; {AT_HAND.name}"
    rates = rates_as_json(rates_from(record, fitted_dispatch_s(record)))
    content = {"source": source, "card": get_gpu(record["device"]["name"]).name, "rates": rates}
    OUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
