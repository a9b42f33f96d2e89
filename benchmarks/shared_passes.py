"""What passes that several micro-batches share take and save where layers are streamed, as the planner says.

usage: python -m benchmarks.shared_passes --out RECORD.json                                             (no GPU)

LLaVA-1.5-13B on an RTX 4060: rows of 2,048 and of fewer tokens, 576 of them a picture, rank 16, every layer
checkpointed, layer inputs and the embedding in RAM, paged 8-bit AdamW, eight micro-batches of one row a step.
InstructBLIP-7B, whose pictures take 32 tokens, with all of its layers streamed. Times are estimates from data sheets;
for a link with a share of the card's rate (an older or narrower slot), from the same costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

from eightgig import registry
from eightgig.config.loading import resolve
from eightgig.plan.candidates import Candidates
from eightgig.plan.card_rates import CardRates
from eightgig.plan.plan import card_rates, time_of
from eightgig.plan.step_time import device_seconds, issue_seconds, link_seconds
from eightgig.plan.workload import LargestWorkloads
from eightgig.registry.gpus import get_gpu

CARD = "RTX 4060"
SETTINGS = {
    "training.lora.rank": "16",
    "training.gradient_accumulation_steps": "8",
    "training.optimizer": "paged_adamw_8bit",
    "hardware.checkpointed_layers": "null",
    "hardware.offload_layer_inputs": "true",
    "hardware.embedding_on_host": "true",
}
# Tokens of text, streamed layers. What the templates add to the text comes on top.
CASES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "llava-1.5-13b": ((1472, 20), (1472, 40), (128, 20), (128, 40)),
    "instructblip-vicuna-7b": ((128, 32), (32, 32)),
}
TOGETHER = (1, 2, 4, 8)
LINK_SHARES = (1.0, 0.25)


def rows_of(model: str) -> list[dict[str, Any]]:
    """Each case of `model`, with so many micro-batches a pass."""
    spec, card = registry.get(model), get_gpu(CARD)
    config = resolve("ultra_low_memory", SETTINGS | {"model.name": model}).config
    rates = _rates()
    candidates = Candidates(config, spec, card, card.vram_bytes, LargestWorkloads(spec), rates).with_validation()
    rows = []
    for max_length, num_streamed in CASES[model]:
        for together in TOGETHER:
            found = candidates.get(
                {
                    "data.max_length": max_length,
                    "hardware.streamed_layers": num_streamed,
                    "hardware.micro_batches_per_pass": together,
                }
            )
            assert found is not None
            costs, num_passes = found.simulation.micro_batch_costs, found.config.passes_per_step
            rows.append(
                {
                    "model": model,
                    "row_tokens": found.work.batch.num_tokens // together,
                    "num_streamed_layers": num_streamed,
                    "micro_batches_per_pass": together,
                    "fits": found.fits,
                    "allocated_bytes": found.result.peak_allocated_bytes,
                    "reserved_bytes": found.result.peak_reserved_bytes,
                    "host_bytes": found.simulation.host_bytes,
                    "step_s": {
                        f"{share:g} of the link": time.step_s
                        for share in LINK_SHARES
                        if (time := time_of(found.simulation, found.config, found.work, _with_link(rates, share)))
                    },
                    "link_s": num_passes * link_seconds(costs, rates),
                    "device_s": num_passes * device_seconds(costs, rates),
                    "issue_s": num_passes * issue_seconds(costs, rates),
                }
            )
            print(rows[-1], flush=True)
    return rows


def _rates() -> CardRates:
    rates = card_rates(get_gpu(CARD))
    assert rates is not None
    return rates


def _with_link(rates: CardRates, share: float) -> CardRates:
    return replace(rates, transfer_bytes_per_s=share * rates.transfer_bytes_per_s)


def main() -> None:
    """Plan each case, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for model in CASES for row in rows_of(model)]
    conditions = {
        "card": CARD,
        "link_bytes_per_s": _rates().transfer_bytes_per_s,
        "preset": "ultra_low_memory",
        "settings": SETTINGS,
    }
    write_record(arguments.out, name="shared_passes", figures={"rows": rows}, conditions=conditions)


if __name__ == "__main__":
    main()
