"""Exact match ignores what a reader would not count as a difference, and nothing else."""

from __future__ import annotations

import pytest

from eightgig.evaluate.metrics import exact_match


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("Seven", "seven", 1.0),
        ("  a  red\ncircle. ", "a red circle", 1.0),
        ("１２", "12", 1.0),
        ("红色。", "红色", 1.0),
        ("7", "17", 0.0),
        ("7.5", "7", 0.0),
        ("seven bars", "seven", 0.0),
        ("", "seven", 0.0),
    ],
)
def test_exact_match(answer: str, expected: str, score: float) -> None:
    assert exact_match(answer, expected) == score
