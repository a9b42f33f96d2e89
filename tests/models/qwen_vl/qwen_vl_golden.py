"""The numbers recorded from the original code (tests/golden/qwen_vl: tiny_a.json says how), ready for comparison."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "golden" / "qwen_vl"
RECORD: dict[str, Any] = json.loads((FOLDER / "tiny_a.json").read_text(encoding="utf-8"))
TENSORS: dict[str, Tensor] = load_file(FOLDER / "tiny_a.safetensors")
CONFIG: dict[str, Any] = RECORD["config"]
CASES: dict[str, dict[str, Any]] = RECORD["cases"]
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)


def published_weights() -> dict[str, Tensor]:
    """The model's weights under the published names."""
    return {
        name: value for name, value in TENSORS.items() if name.startswith("transformer.") or name == "lm_head.weight"
    }


def image(name: str) -> NDArray[np.uint8]:
    """The recorded image `name`, [height, width, 3], drawn by its formula."""
    item = RECORD["images"]["items"][name]
    y, x = np.mgrid[0 : item["height"], 0 : item["width"]].astype(np.int64)
    channels = [
        (_triangle(a * x + b * y + s, p) + _triangle(d * ((x * x + e * y * y) // f) + g, q)) // 2
        for a, b, s, p, d, e, f, g, q in item["channels"]
    ]
    pixels = np.stack(channels, axis=-1).astype(np.uint8)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == item["uint8_sha256"]
    return pixels


def _triangle(t: NDArray[np.int64], p: int) -> NDArray[np.int64]:
    return np.abs(t % (2 * p) - p) * 255 // p


def pixel_values(names: list[str]) -> Tensor | None:
    """Normalised pixels [images, 3, 448, 448] of recorded images that need no resizing; None for no image."""
    if not names:
        return None
    normalised = [((image(name).astype(np.float32) / 255) - MEAN) / STD for name in names]
    return torch.from_numpy(np.stack(normalised)).permute(0, 3, 1, 2).contiguous()


def case_inputs(name: str, *, labels: bool = False) -> dict[str, Any]:
    """What the model is called with in the case `name`."""
    inputs = {
        "input_ids": TENSORS[f"case.{name}.input_ids"],
        "attention_mask": TENSORS[f"case.{name}.attention_mask"],
        "pixel_values": pixel_values(CASES[name]["images"]),
    }
    if labels:
        inputs["labels"] = TENSORS[f"case.{name}.labels"]
    return inputs


def stacked(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """`values` by this code's parameter names as values by published names."""
    result = dict(values)
    prefix = "transformer.visual.attn_pool.attn"
    for kind in ("weight", "bias"):
        parts = [result.pop(f"{prefix}.{part}_proj.{kind}", None) for part in "qkv"]
        if parts[0] is not None:
            result[f"{prefix}.in_proj_{kind}"] = torch.cat(parts)
    return result
