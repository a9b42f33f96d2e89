"""The charts of one run: which records become which lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eightgig.core.units import GIB, format_bytes
from eightgig.report.charts import (
    BarGroup,
    BarPart,
    Point,
    Series,
    grouped_bars,
    line_chart,
    nice_axis,
    share_bar,
    step_axis,
    trailing_mean,
)
from eightgig.report.records import Record, RunRecords

STEP_LABEL = "optimizer step"
_WIDE_PX, _NARROW_PX = (1000, 330), (340, 250)
_SMALL_PX, _SMALL_NARROW_PX = (484, 190), (340, 170)
_BAR_PX, _NARROW_BAR_PX = (1000, 44), (400, 40)
_NUM_PART_COLOURS = 8  # of the style sheet; the numbers in the bar tell apart what shares one


@dataclass(frozen=True)
class Chart:
    """A chart ready for the page, drawn for a wide and for a narrow screen, with the names of its lines.

    Attributes:
        title: what it shows.
        wide: SVG for screens of 600 px and more, and for print.
        narrow: SVG for phones.
        legend: (CSS class, name) of each line; empty where the title says it all.
    """

    title: str
    wide: str
    narrow: str
    legend: tuple[tuple[str, str], ...]


def points(records: Sequence[Record], key: str, *, scale: float = 1.0) -> tuple[Point, ...]:
    """(step, `scale` × value of `key`) of each record that has one."""
    return tuple((record["step"], scale * record[key]) for record in records if record.get(key) is not None)


def loss_chart(records: RunRecords) -> Chart | None:
    """Training loss of each step, its trailing mean, and the validation loss; None without a step."""
    training = points(records.steps, "loss")
    validation = points(records.validations, "loss")
    if not training:
        return None
    window = max(1, len(training) // 25)
    series = [Series("training, each step", training, "raw" if window > 1 else "train")]
    if window > 1:
        series.append(Series(f"training, mean of {window} steps", trailing_mean(training, window), "train"))
    if validation:
        series.append(Series("validation", validation, "validation", has_markers=True))
    return _chart("Loss", "loss per target token (nats)", series, sizes_px=(_WIDE_PX, _NARROW_PX))


def small_charts(records: RunRecords) -> list[Chart]:
    """Exact match, learning rate, gradient norm and speed over the steps, those that were recorded."""
    wanted = [
        ("Exact match", "%", points(records.validations, "exact_match", scale=100), "validation", True),
        ("Learning rate", "learning rate", points(records.steps, "learning_rate"), "train", False),
        ("Gradient norm before clipping", "norm", points(records.steps, "grad_norm"), "train", False),
        ("Speed", "tokens/s", points(records.steps, "tokens_per_s"), "train", False),
    ]
    return [
        _chart(
            title,
            unit,
            [Series(title, line, css, has_markers=dots)],
            sizes_px=(_SMALL_PX, _SMALL_NARROW_PX),
            axis_holds=100.0 if unit == "%" else 0.0,
        )
        for title, unit, line, css, dots in wanted
        if line
    ]


def memory_bar(rows: Sequence[tuple[str, int]], whole_bytes: int, *, limit_bytes: int | None = None) -> Chart:
    """The memory by category as one bar, of which `whole_bytes` is the full length; a line marks `limit_bytes`."""
    parts = [
        BarPart(name, size, f"part part-{number % _NUM_PART_COLOURS + 1}") for number, (name, size) in enumerate(rows)
    ]
    title = "Memory by category"
    return Chart(
        title=title,
        wide=share_bar(title, parts, whole_bytes, size_px=_BAR_PX, limit=limit_bytes),
        narrow=share_bar(title, parts, whole_bytes, size_px=_NARROW_BAR_PX, limit=limit_bytes),
        legend=tuple((part.css_class, part.name) for part in parts),
    )


def bytes_bars(title: str, rows: Sequence[tuple[str, Sequence[int]]], series: Sequence[tuple[str, str]]) -> Chart:
    """Bars of bytes side by side: one group a row, one bar for each of `series` (CSS class, name)."""
    groups = [
        BarGroup(name, tuple(size / GIB for size in sizes), tuple(format_bytes(size) for size in sizes))
        for name, sizes in rows
    ]
    axis = nice_axis((size for group in groups for size in group.sizes), "GiB", num_ticks=4, from_zero=True)
    wide_px, narrow_px = _WIDE_PX[0], _NARROW_PX[0]
    return Chart(
        title=title,
        wide=grouped_bars(title, axis, groups, series, width_px=wide_px),
        narrow=grouped_bars(title, axis, groups, series, width_px=narrow_px),
        legend=tuple(series) if len(series) > 1 else (),
    )


def _chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    sizes_px: tuple[tuple[int, int], ...],
    axis_holds: float = 0.0,
) -> Chart:
    """The chart of `series`; its y axis holds 0, all values and `axis_holds`."""
    values = [axis_holds, *(point[1] for line in series for point in line.points)]
    y_axis = nice_axis(values, unit, num_ticks=4, from_zero=True)
    x_axis = step_axis((point[0] for line in series for point in line.points), STEP_LABEL)
    few_ticks = step_axis((x_axis.low, x_axis.high), STEP_LABEL, num_ticks=4)
    wide_px, narrow_px = sizes_px
    return Chart(
        title=title,
        wide=line_chart(title, x_axis, y_axis, series, size_px=wide_px),
        narrow=line_chart(title, few_ticks, y_axis, series, size_px=narrow_px),
        legend=tuple((line.css_class, line.name) for line in series) if len(series) > 1 else (),
    )
