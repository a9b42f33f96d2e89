"""What LLaVA-1.5-13B takes of an RTX 4060 with the weights of some layers in RAM, as the planner says.

usage: python -m benchmarks.streamed_weights --out RECORD.json                                          (no GPU)

One row of 2,048 tokens, 576 of them a picture, rank 16, every layer checkpointed, paged 8-bit AdamW, one micro-batch a
step. It fits where reserved memory and the CUDA context stay below what the card has.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

from eightgig import registry
from eightgig.config.loading import resolve
from eightgig.plan.plan import plan
from eightgig.registry.gpus import get_gpu

MODEL, CARD = "llava-1.5-13b", "RTX 4060"
SETTINGS = {
    "model.name": MODEL,
    "training.lora.rank": "16",
    "training.gradient_accumulation_steps": "1",
    "training.optimizer": "paged_adamw_8bit",
    "data.max_length": "1472",
}
STREAMED = ((0, False), (17, True), (20, True), (21, True), (40, True))


def row(num_streamed: int, embedding_on_host: bool) -> dict[str, Any]:
    """The plan with so many layers' weights, and perhaps the embedding, in RAM."""
    levers = {
        "hardware.streamed_layers": str(num_streamed),
        "hardware.embedding_on_host": str(embedding_on_host).lower(),
    }
    config = resolve("ultra_low_memory", SETTINGS | levers).config
    made = plan(config, registry.get(MODEL), get_gpu(CARD), reserve_bytes=0)
    assert made.time is not None
    told = {
        "num_streamed_layers": num_streamed,
        "embedding_on_host": embedding_on_host,
        "fits": made.fits,
        "allocated_bytes": made.peak.allocated_bytes,
        "reserved_bytes": made.peak.reserved_bytes,
        "host_bytes": made.host_bytes,
        "step_s": made.time.step_s,
    }
    print(told, flush=True)
    return told


def main() -> None:
    """Plan each, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    conditions = {"model": MODEL, "card": CARD, "settings": SETTINGS}
    rows = [row(num_streamed, embedding) for num_streamed, embedding in STREAMED]
    write_record(arguments.out, name="streamed_weights", figures={"rows": rows}, conditions=conditions)


if __name__ == "__main__":
    main()
