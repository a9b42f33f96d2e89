"""Tokens that a language model computes for a spread of samples: as they come, by length, and in shared rows.

usage: python -m benchmarks.padding --out RECORD.json                                                (no GPU)

NUM_SAMPLES made-up samples: texts of 30 to 1,500 tokens, as many between 30 and 60 as between 750 and 1,500, and mostly
one image of a usual size; their image tokens are those of each model's own rule. STEP_SAMPLES make an optimizer step.
Counted is one epoch, of what `StepOrder` gives: tokens with padding, passes, and the pairs of tokens within reach of each
other in attention (half of each square, which all have in common, is left in).
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

from eightgig import registry
from eightgig.config import Batching
from eightgig.data.grouping import Grouping
from eightgig.data.order import StepOrder
from eightgig.registry import ModelSpec

MODELS = ("llava-1.5-7b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
NUM_SAMPLES = 512
STEP_SAMPLES = 32
BATCH_SIZES = (1, 4, 32)
TEXT_TOKENS = (30, 1500)
IMAGE_SIZES_PX = ((336, 336), (640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (1920, 1080))
TEXT_ONLY_SHARE = 1 / 8
IMAGE_PX = 1024  # data.image_size where a model takes images of any size
SEED = 0


def lengths_of(spec: ModelSpec) -> list[int]:
    """Tokens of each sample, those of its image among them."""
    chooser = random.Random(SEED)
    image_px = None if spec.family.name == "llava" else IMAGE_PX
    lengths = []
    for _ in range(NUM_SAMPLES):
        text = round(math.exp(chooser.uniform(*map(math.log, TEXT_TOKENS))))
        width_px, height_px = chooser.choice(IMAGE_SIZES_PX)
        has_image = chooser.random() >= TEXT_ONLY_SHARE
        image = spec.family.num_image_tokens(spec.facts, image_px, width_px=width_px, height_px=height_px)
        lengths.append(text + image * has_image)
    return lengths


def epoch(lengths: list[int], batch_size: int, batching: Batching) -> dict[str, Any]:
    """What an epoch computes."""
    order = StepOrder(
        NUM_SAMPLES, batch_size, STEP_SAMPLES // batch_size, SEED, Grouping(batching, batch_size, lengths)
    )
    groups = [
        [lengths[index] for index in group]
        for step in range(order.steps_per_epoch)
        for group in order.micro_batches(step)
    ]
    if batching is Batching.PACKED:
        computed = sum(map(sum, groups))
        pairs = sum(length**2 for length in lengths)
    else:
        computed = sum(len(group) * max(group) for group in groups)
        pairs = sum(len(group) * max(group) ** 2 for group in groups)
    return {
        "num_passes": len(groups),
        "num_computed_tokens": computed,
        "padding_share": 1 - sum(lengths) / computed,
        "num_attention_pairs": pairs,
        "largest_pass_tokens": max(
            sum(group) if batching is Batching.PACKED else len(group) * max(group) for group in groups
        ),
    }


def main() -> None:
    """Count, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figures = {}
    for name in MODELS:
        lengths = lengths_of(registry.get(name))
        figures[name] = {
            "num_tokens": sum(lengths),
            "longest_tokens": max(lengths),
            "by_batch_size": {
                str(batch_size): {batching.value: epoch(lengths, batch_size, batching) for batching in Batching}
                for batch_size in BATCH_SIZES
            },
        }
    conditions = {
        "num_samples": NUM_SAMPLES,
        "samples_a_step": STEP_SAMPLES,
        "text_tokens": TEXT_TOKENS,
        "image_sizes_px": IMAGE_SIZES_PX,
        "text_only_share": TEXT_ONLY_SHARE,
        "image_px": IMAGE_PX,
        "seed": SEED,
    }
    write_record(arguments.out, name="padding", figures=figures, conditions=conditions)


if __name__ == "__main__":
    main()
