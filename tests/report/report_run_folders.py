"""Run folders as a training run leaves them, made up for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

GIB = 1024**3

CONFIG: dict[str, Any] = {
    "schema_version": 1,
    "preset": "ultra_low_memory",
    "model": {"name": "llava-1.5-7b", "revision": None, "random_weights_seed": 7},
    "training": {
        "method": "qlora",
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "learning_rate": 2e-4,
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": None},
        "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    },
    "data": {"data_path": "charts/train.jsonl", "val_path": None, "max_length": 512, "image_size": 336},
    "hardware": {"device": "cuda", "mixed_precision": "bf16", "gradient_checkpointing": True, "cap_gib": 7.25},
    "validation": {"every_steps": 50, "max_samples": 200},
    "output_dir": "runs",
    "seed": 42,
}

SOURCES = {
    "schema_version": "default",
    "preset": "flag --preset",
    "model.name": "flag --model",
    "training.lora.rank": "preset ultra_low_memory",
    "training.lora.alpha": "preset ultra_low_memory",
    "data.data_path": "file charts.yaml",
    "seed": "default",
}

RUN: dict[str, Any] = {
    "status": "finished",
    "started_at": "2026-11-24T06:00:00+00:00",
    "finished_at": "2026-11-24T06:31:10+00:00",
    "command": "eightgig train --preset ultra_low_memory --data charts/train.jsonl",
    "eightgig_version": "0.1.0",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2"},
    "device": {"name": "NVIDIA GeForce RTX 4060", "type": "cuda", "total_bytes": 8 * GIB, "compute_capability": "8.9"},
    "precision": {"compute_dtype": "bfloat16", "note": None},
    "steps_planned": 200,
    "steps_done": 200,
    "train_s": 1834.2,
    "num_trainable_parameters": 19_988_480,
    "num_parameters": 7_063_427_072,
    "num_train_samples": 6400,
    "num_validation_samples": 200,
    "num_quarantined": 3,
    "num_cut_prompt_samples": 2,
    "num_cut_answer_samples": 0,
}

RECEIPT: dict[str, Any] = {
    "model": "llava-1.5-7b",
    "asked": "nf4 with double quantisation in the language model's linear layers, 16-bit elsewhere",
    "rows": [
        {"group": "language linears", "module_class": "Linear4bit", "num_modules": 224, "num_trainable": 0}
        | {"num_parameters": 6_476_005_376, "storage_dtype": "uint8", "is_4bit": True}
        | {"bytes_16bit": 12_952_010_752, "bytes_now": 3_339_190_272},
        {"group": "adapters", "module_class": "Linear", "num_modules": 448, "num_trainable": 19_988_480}
        | {"num_parameters": 19_988_480, "storage_dtype": "float32", "is_4bit": False}
        | {"bytes_16bit": 39_976_960, "bytes_now": 79_953_920},
        {"group": "vision tower", "module_class": "Conv2d, LayerNorm, Linear", "num_modules": 197, "num_trainable": 0}
        | {"num_parameters": 303_507_456, "storage_dtype": "bfloat16", "is_4bit": False}
        | {"bytes_16bit": 607_014_912, "bytes_now": 607_014_912},
    ],
    "mismatches": [],
    "num_parameters": 6_799_501_312,
    "num_trainable": 19_988_480,
    "bytes_16bit": 13_599_002_624,
    "bytes_now": 4_026_159_104,
}

MEMORY: dict[str, Any] = {
    "device": "NVIDIA GeForce RTX 4060",
    "peak_allocated_bytes": 5_600_000_000,
    "peak_reserved_bytes": 5_800_000_000,
    "device_used_bytes": 6_200_000_000,
    "categories": {
        "4-bit weights": 3_339_190_272,
        "16-bit weights": 1_130_000_000,
        "adapters": 79_953_920,
        "gradients": 79_953_920,
        "optimizer": 41_000_000,
        "activations and temporary": 929_901_888,
        "allocator overhead": 200_000_000,
        "CUDA context": 400_000_000,
    },
    "host_peak_rss_bytes": 2_100_000_000,
}

VERIFICATION = {
    "ok": True,
    "max_abs_difference": 0.0125,
    "relative_difference": 0.00072,
    "tolerance": 0.02,
    "adapter_effect": 0.41,
    "how": "a fresh process loaded the adapter with peft and compared the logits of one validation sample",
}


def step_record(step: int) -> dict[str, Any]:
    """A step of a run whose loss falls."""
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 200,
        "loss": 2.4 * math.exp(-step / 45) + 0.12 + 0.08 * math.sin(step * 1.7) * math.exp(-step / 90),
        "learning_rate": 2e-4 * min(step / 6, 0.5 * (1 + math.cos(math.pi * step / 200))),
        "grad_norm": 1.4 * math.exp(-step / 80) + 0.2 + 0.05 * math.sin(step),
        "skipped": False,
        "num_target_tokens": 210,
        "num_tokens": 32_000,
        "num_images": 32,
        "step_s": 9.1,
        "data_wait_s": 0.05,
        "tokens_per_s": 32_000 / 9.1 + 60 * math.sin(step * 0.9),
        "images_per_s": 32 / 9.1,
        "memory_now_bytes": 4_900_000_000,
        "memory_peak_bytes": 5_600_000_000,
        "memory_reserved_peak_bytes": 5_800_000_000,
    }


def validation_record(step: int, *, exact_match: float | None) -> dict[str, Any]:
    """A validation of the same run."""
    loss = 2.5 * math.exp(-step / 48) + 0.19
    return {"kind": "validation", "step": step, "loss": loss, "exact_match": exact_match} | {
        "num_generated": 8,
        "validation_s": 21.5,
    }


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write `records` as a run does."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def draw_bars(path: Path, heights: Iterable[int]) -> None:
    """A picture of a bar chart, larger than a thumbnail."""
    image = Image.new("RGB", (448, 336), "white")
    pen = ImageDraw.Draw(image)
    for index, height in enumerate(heights):
        pen.rectangle((40 + index * 90, 300 - height * 13, 100 + index * 90, 300), fill=(52, 82, 60 + index * 40))
    pen.line((30, 300, 430, 300), fill="black", width=3)
    image.save(path)


def write_generations(folder: Path) -> None:
    """Eight questions with pictures, asked before, within and after training; one is wrong at the end."""
    rows = []
    for index in range(8):
        picture = folder / f"chart-{index}.png"
        draw_bars(picture, [3 + index, 12, 7, 18 - index])
        for step in (0, 100, 200):
            is_right = step == 200 and index != 5
            rows.append(
                {
                    "step": step,
                    "sample_id": f"chart-{index}#0",
                    "images": [str(picture)],
                    "question": f"How tall is bar {index % 4 + 1}?",
                    "expected": str(3 + index),
                    "answer": str(3 + index) if is_right else "a blue circle",
                    "correct": is_right,
                }
            )
    write_jsonl(folder / "generations.jsonl", rows)


def write_run(folder: Path) -> Path:
    """A complete run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"config": CONFIG, "sources": SOURCES, "run": RUN, "receipt": RECEIPT, "memory": MEMORY}
    for name, content in (parts | {"verification": VERIFICATION}).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "best.json").write_text(json.dumps({"step": 200, "loss": 0.2287}), encoding="utf-8")
    metrics = [validation_record(0, exact_match=0.0)]
    for step in range(1, 201):
        metrics.append(step_record(step))
        if step % 50 == 0:
            metrics.append(validation_record(step, exact_match={50: 0.25, 100: 0.5, 150: 0.75, 200: 0.875}[step]))
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_generations(folder)
    reasons = [("image_missing", "images/91.png does not exist"), ("empty_answer", "the answer is empty")]
    write_jsonl(
        folder / "quarantine.jsonl",
        [
            {"file": "charts/train.jsonl", "line": 17 + i, "sample_id": f"chart-{i}", "reason": reason, "code": code}
            for i, (code, reason) in enumerate([*reasons, reasons[0]])
        ],
    )
    return folder


PLANNED: dict[str, Any] = {
    "allocated_bytes": 5_544_000_000,
    "reserved_bytes": 5_858_000_000,
    "device_bytes": 6_262_000_000,
    "breakdown": {
        "4-bit weights": 3_339_190_272,
        "16-bit weights": 1_130_000_000,
        "adapters": 79_953_920,
        "gradients": 79_953_920,
        "optimizer": 41_000_000,
        "checkpoints of layer inputs": 500_000_000,
        "logits and loss": 373_901_888,
        "allocator overhead": 314_000_000,
        "CUDA context": 404_000_000,
    },
}
"""What memory.json holds of a plan that tells apart more than measuring can."""
