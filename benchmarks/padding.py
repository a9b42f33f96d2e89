"""Tokens that a language model computes for a spread of samples: as they come, by length, and in shared rows.

usage: python -m benchmarks.padding --out RECORD.json                                                (no GPU)

NUM_SAMPLES made-up samples: texts of 30 to 1,500 tokens, as many between 30 and 60 as between 750 and 1,500, and mostly
one image of a usual size; their image tokens are those of each model's own rule. STEP_SAMPLES make an optimizer step.
Counted is one epoch of what `StepOrder` gives: tokens with padding, passes, and what attention squares: the pairs of
positions of a row, or of each sample's stretch of it (causal attention takes half of them either way).

For PLANNED_MODEL also `eightgig plan` is asked, with a file of such samples, a letter of text being about a token of
its stand-in tokenizer: estimated times, and the memory of the largest pass. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from PIL import Image

from eightgig import registry
from eightgig.app.planning import plan_run
from eightgig.config import Batching, TrainingConfig
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
CARD = "RTX 4060"
PLANNED_MODEL = "llava-1.5-7b"
PLANNED_BATCH_SIZES = (1, 4)
MARKUP_TOKENS = 30  # about what the chat template and the question take


def samples() -> Iterator[tuple[int, tuple[int, int], bool]]:
    """Of each sample the tokens of its text, width and height of a picture, and whether it has one."""
    chooser = random.Random(SEED)
    for _ in range(NUM_SAMPLES):
        text = round(math.exp(chooser.uniform(*map(math.log, TEXT_TOKENS))))
        yield text, chooser.choice(IMAGE_SIZES_PX), chooser.random() >= TEXT_ONLY_SHARE


def lengths_of(spec: ModelSpec) -> list[int]:
    """Tokens of each sample, those of its image among them."""
    image_px = None if spec.family.name == "llava" else IMAGE_PX
    lengths = []
    for text, (width_px, height_px), has_image in samples():
        image = spec.family.num_image_tokens(spec.facts, image_px, width_px=width_px, height_px=height_px)
        lengths.append(text + image * has_image)
    return lengths


def epoch(lengths: list[int], batch_size: int, batching: Batching) -> dict[str, Any]:
    """What an epoch computes."""
    order = StepOrder(
        NUM_SAMPLES, batch_size, STEP_SAMPLES // batch_size, SEED, Grouping(batching, batch_size, lengths)
    )
    steps = map(order.micro_batches, range(order.steps_per_epoch))
    groups = [[lengths[index] for index in group] for groups in steps for group in groups]
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


def write_data(folder: Path) -> Path:
    """The samples as a data file, with blank pictures."""
    for width_px, height_px in IMAGE_SIZES_PX:
        Image.new("RGB", (width_px, height_px)).save(folder / f"{width_px}x{height_px}.png")
    records = []
    for text, (width_px, height_px), has_image in samples():
        image = {"image": f"{width_px}x{height_px}.png"} if has_image else {}
        records.append({**image, "question": "?", "answer": "a" * max(1, text - MARKUP_TOKENS)})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def planned(data: Path, batch_size: int, batching: Batching) -> dict[str, Any]:
    """What `eightgig plan` says of the samples in `data`, without any lever on memory."""
    config = TrainingConfig.model_validate(
        {
            "model": {"name": PLANNED_MODEL, "random_weights_seed": SEED},
            "data": {"data_path": str(data), "max_length": 2 * TEXT_TOKENS[1], "val_fraction": 0},
            "training": {
                "batch_size": batch_size,
                "gradient_accumulation_steps": STEP_SAMPLES // batch_size,
                "batching": batching.value,
            },
        }
    )
    found = plan_run(config, gpu=CARD)
    assert found.time is not None
    return {
        "step_s": found.time.step_s,
        "tokens_per_s": found.time.tokens_per_s,
        "device_bytes": found.peak.device_bytes,
        "largest_pass": {key: found.workload[key] for key in ("num_samples", "num_images", "num_tokens")},
    }


def main() -> None:
    """Count, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
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
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        figures[PLANNED_MODEL]["planned"] = {
            str(batch_size): {batching.value: planned(data, batch_size, batching) for batching in Batching}
            for batch_size in PLANNED_BATCH_SIZES
        }
    conditions = {
        "card": CARD,
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
