"""Numbers as they are said to people."""

from __future__ import annotations

import math

import pytest

from eightgig.config import TrainingMethod
from eightgig.core.units import format_duration
from eightgig.report.wording import (
    format_count,
    format_method,
    format_moment,
    format_number,
    format_share,
)


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (222, "3 min 42 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (48 * 3600, "2 d 00 h"),
        (53.2 * 3600, "2 d 05 h"),
    ],
)
def test_durations(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.925, "92.5 %"), (0.1234, "12.3 %"), (None, "–")]
)
def test_shares(share: float | None, text: str) -> None:
    assert format_share(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9999, "9,999"), (25_000, "25 k"), (19_988_480, "20 M"), (7_063_427_072, "7.06 B"), (None, "–")],
)
def test_counts(count: int | None, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.123456, "0.1235"), (None, "–"), (math.inf, "not finite")])
def test_numbers(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-11-24T06:00:00+00:00", "2026-11-24 06:00:00 UTC"),
        ("2026-11-24T06:00:00.5", "2026-11-24 06:00:00"),
        ("yesterday", "yesterday"),
        (None, "–"),
    ],
)
def test_moments(moment: str | None, text: str) -> None:
    assert format_moment(moment) == text


def test_every_method_has_a_name() -> None:
    assert [format_method(method) for method in TrainingMethod] == ["QLoRA", "LoRA", "full fine-tuning"]
