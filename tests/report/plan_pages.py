"""Plans and tables of cards as their commands give them, made by hand for the tests."""

from __future__ import annotations

from typing import Any

GIB = 1024**3
MIB = 1024**2

PLAN: dict[str, Any] = {
    "model": "llava-1.5-7b",
    "method": "qlora",
    "gpu": "RTX 4060",
    "budget_bytes": 7 * GIB,
    "fits": True,
    "peak": {
        "allocated_bytes": 5 * GIB,
        "reserved_bytes": 5 * GIB + 512 * MIB,
        "device_bytes": 6 * GIB,
        "moment": "train",
    },
    "breakdown": {
        "4-bit weights": 3 * GIB,
        "16-bit weights": GIB,
        "adapters": 256 * MIB,
        "gradients": 128 * MIB,
        "optimizer": 128 * MIB,
        "checkpoints of layer inputs": 128 * MIB,
        "recomputed layer": 128 * MIB,
        "vision tower": 0,
        "logits and loss": 256 * MIB,
        "allocator overhead": 512 * MIB,
        "CUDA context": 512 * MIB,
    },
    "phases": {"load": 4 * GIB, "validate": 5 * GIB, "train": 6 * GIB, "save": 6 * GIB},
    "workload": {"num_samples": 2, "num_tokens": 2176},
    "config": {"preset": "ultra_low_memory", "data": {"max_length": 512, "val_path": None}, "seed": 42},
    "levers": (),
    "time": None,
}


def matrix_json() -> dict[str, Any]:
    """Two models on three cards, two of them with the same size on the box."""
    names = {"RTX 4060": 8, "RTX 3070": 8, "A100 80GB SXM": 80}
    lengths = {
        "llava-1.5-7b": {"RTX 4060": 512, "RTX 3070": 2048, "A100 80GB SXM": 2048},
        "llava-1.5-13b": {"RTX 4060": None, "RTX 3070": None, "A100 80GB SXM": 2048},
    }
    speeds = {("llava-1.5-7b", "RTX 4060"): (150.0, 0.1), ("llava-1.5-7b", "A100 80GB SXM"): (1500.0, 1.0)}
    return {
        "preset": "ultra_low_memory",
        "method": "qlora",
        "reserve_bytes": GIB,
        "ladder_tokens": (256, 512, 1024, 2048, 4096, 8192),
        "common_tokens": 512,
        "reference_gpu": "A100 80GB SXM",
        "gpus": [
            {"name": name, "vram_gb": gb, "vram_bytes": gb * GIB, "budget_bytes": (gb - 1) * GIB}
            for name, gb in names.items()
        ],
        "models": [
            {"name": name, "num_parameters": count, "longest_tokens": 2048}
            for name, count in (("llava-1.5-7b", 7_063_427_072), ("llava-1.5-13b", 13_350_000_000))
        ],
        "cells": [
            {"model": model, "gpu": gpu, "max_length_tokens": length, "device_bytes": 9 * GIB}
            | dict(zip(("tokens_per_s", "relative_speed"), speeds.get((model, gpu), (None, None)), strict=True))
            for model, by_gpu in lengths.items()
            for gpu, length in by_gpu.items()
        ],
        "left_out": [{"model": "qwen-vl", "reason": "no <processor>"}],
    }
