"""Charts draw the data that they are given: every coordinate is checked against the axis by hand."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.report.charts import (
    Axis,
    BarPart,
    Series,
    finite_runs,
    format_tick,
    line_chart,
    nice_axis,
    share_bar,
    step_axis,
    thin_out,
    trailing_mean,
)

X_AXIS = Axis("step", 0, 100, (0, 50, 100))
Y_AXIS = Axis("loss", 0, 4, (0, 2, 4))


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each line of a chart."""
    lines = ET.fromstring(svg).iter("polyline")
    return [[tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in lines]


def test_points_of_a_curve_are_the_data_on_the_axes() -> None:
    data = ((0.0, 4.0), (25.0, 1.0), (100.0, 0.0))
    svg = line_chart("Loss", X_AXIS, Y_AXIS, [Series("training", data, "train")], size_px=(400, 240))
    # Tick labels are one character (7 px) wide: the plot spans x 19..386 and y 200 (value 0) .. 26 (value 4).
    assert polylines(svg) == [[(19.0, 26.0), (19 + 367 / 4, 200 - 174 / 4), (386.0, 200.0)]]


def test_ticks_stand_where_their_values_are() -> None:
    svg = ET.fromstring(line_chart("Loss", X_AXIS, Y_AXIS, [], size_px=(400, 240)))
    texts = {text.text: text.attrib for text in svg.iter("text")}
    assert float(texts["2"]["y"]) == pytest.approx(113)
    assert float(texts["50"]["x"]) == pytest.approx((19 + 386) / 2, abs=0.01)
    assert {"loss", "step"} <= texts.keys()


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    data = ((0.0, 1.0), (25.0, math.nan), (50.0, 2.0), (75.0, 3.0), (100.0, math.inf))
    svg = line_chart("Loss", X_AXIS, Y_AXIS, [Series("training", data, "train")], size_px=(400, 240))
    assert [len(line) for line in polylines(svg)] == [1, 2]


def test_markers_carry_their_value_and_names_are_escaped() -> None:
    series = Series("<b>&validation", ((50.0, 1.25),), "validation", has_markers=True)
    svg = line_chart("A & B", X_AXIS, Y_AXIS, [series], size_px=(400, 240))
    title = ET.fromstring(svg).find("circle/title")
    assert title is not None
    assert title.text == "<b>&validation, step 50: 1.25"
    assert "<b>" not in svg


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40), st.booleans())
def test_an_axis_holds_all_values_between_round_ends(values: list[float], from_zero: bool) -> None:
    axis = nice_axis(values, "loss", from_zero=from_zero)
    slack = 1e-9 * (axis.high - axis.low)
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    assert 2 <= len(axis.ticks) <= 8
    assert not from_zero or axis.low <= 0 <= axis.high
    step = axis.ticks[1] - axis.ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_step) for round_step in (1, 2, 5, 10)) < 1e-6


def test_an_axis_without_finite_values_still_has_a_range() -> None:
    assert nice_axis([math.nan], "loss").high > nice_axis([], "loss").low


@pytest.mark.parametrize(
    ("steps", "low", "high", "ticks"),
    [
        ([0, 200], 0, 200, (0, 50, 100, 150, 200)),
        ([1, 7], 1, 7, (1, 2, 3, 4, 5, 6, 7)),
        ([3], 3, 4, (3, 4)),
        ([], 0, 1, (0, 1)),
    ],
)
def test_a_step_axis_ends_where_the_steps_end(
    steps: list[float], low: float, high: float, ticks: tuple[float, ...]
) -> None:
    assert step_axis(steps, "step") == Axis("step", low, high, ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (0.25, "0.25"), (100, "100"), (1500, "1,500"), (2.5e7, "2.5e7")],
)
def test_tick_labels(value: float, text: str) -> None:
    assert format_tick(value) == text


def test_the_trailing_mean_looks_back_only_and_leaves_out_what_is_not_finite() -> None:
    data = ((1.0, 4.0), (2.0, 2.0), (3.0, math.nan), (4.0, 6.0), (5.0, 10.0))
    assert trailing_mean(data, 2) == ((1.0, 4.0), (2.0, 3.0), (4.0, 4.0), (5.0, 8.0))
    assert trailing_mean(data[:2], 1) == data[:2]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=500), st.integers(2, 50))
def test_thinning_keeps_the_extremes_and_invents_nothing(values: list[float], max_points: int) -> None:
    data = [(float(index), value) for index, value in enumerate(values)]
    kept = thin_out(data, max_points)
    assert len(kept) <= max(max_points, 2)
    assert set(kept) <= set(data)
    assert kept == sorted(kept)
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)


def test_finite_runs_of_nothing_are_none() -> None:
    assert finite_runs([]) == []
    assert finite_runs([(0.0, math.nan), (1.0, math.nan)]) == []


def test_the_parts_of_a_bar_are_as_wide_as_their_shares() -> None:
    parts = [BarPart("weights", 600, "part part-1"), BarPart("rest <1>", 15, "part part-2")]
    svg = ET.fromstring(share_bar("Memory", parts, 1000, size_px=(500, 40)))
    rests, *rectangles = svg.iter("rect")
    assert float(rests.attrib["width"]) == 500
    assert [(float(r.attrib["x"]), float(r.attrib["width"])) for r in rectangles] == [(0, 300), (300, 7.5)]
    assert [text.text for text in svg.iter("text")] == ["1"], "a part without room carries no number"
