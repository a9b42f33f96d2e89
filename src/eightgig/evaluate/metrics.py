"""Metrics on generated answers. A new metric is one function here, listed in METRICS, and its test."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping


def normalise_answer(text: str) -> str:
    """`text` as it is compared: Unicode NFKC, lower case, single spaces, no closing full stop."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.rstrip(".。").rstrip()


def exact_match(answer: str, expected: str) -> float:
    """1.0 where the normalised answer is the expected one, else 0.0."""
    return float(normalise_answer(answer) == normalise_answer(expected))


METRICS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match}
