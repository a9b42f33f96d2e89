"""How numbers are said to people: the same in the report and on the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any


def format_share(share: float | None) -> str:
    """`share` (0 to 1) in per cent to a tenth, e.g. `92.5 %`; `–` where there is none."""
    if share is None:
        return "–"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def format_method(method: str) -> str:
    """The name of a training method as people write it: `QLoRA`, `LoRA`, `full fine-tuning`."""
    return {"qlora": "QLoRA", "lora": "LoRA", "full": "full fine-tuning"}[method]


def format_count(count: int | None) -> str:
    """`count` short: `7.06 B`, `20.0 M`, and in full below ten thousand; `–` where there is none."""
    if count is None:
        return "–"
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (size if unit != 'k' else 1000):.3g} {unit}"
    return f"{count:,}"


def format_number(value: float | None) -> str:
    """`value` to four significant digits; `–` where there is none, `not finite` where it is not a number."""
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def format_moment(moment: str | None) -> str:
    """An ISO 8601 moment to the second as a person reads it, e.g. `2026-11-24 06:00:00 UTC`; other text as it is."""
    if moment is None:
        return "–"
    try:
        return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M:%S %Z}".strip()
    except ValueError:
        return moment


def tower_difference_text(difference: Mapping[str, Any]) -> str:
    """How much a vision tower in 4 bits changes its features, from a receipt's `tower_difference`."""
    mean, worst = difference["mean_relative_error"], difference["worst_relative_error"]
    return (
        f"The vision tower is in 4 bits: over {difference['num_images']} images of the data its features differ from "
        f"those in 16 bits by {100 * mean:.2f} % on average and {100 * worst:.2f} % at worst; their cosine is "
        f"{difference['mean_cosine']:.4f} on average and {difference['worst_cosine']:.4f} at worst."
    )
