"""Small SVG charts as text: axes with units, lines, a bar of shares. Their style is CSS classes only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

Point = tuple[float, float]

_CHARACTER_WIDTH_PX = 7.0  # of the 12 px sans-serif tick labels; a little generous, so that none is cut off
_GROUP_NAME_PX, _BAR_PX, _GROUP_GAP_PX = 19, 16, 8  # of grouped bars: the line of a name, a bar, the gap below
_MAX_DRAWN_POINTS = 2000  # of one line; more can't be told apart on a screen and would only swell the file


@dataclass(frozen=True)
class Axis:
    """A linear axis: what it measures, its range, and the values that carry a label."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what the legend says.
        points: (x, y) in the units of the axes; a non-finite y interrupts the line.
        css_class: how it looks (colour, width, dashes come from the style sheet).
        has_markers: draw a dot with its value at each point.
    """

    name: str
    points: tuple[Point, ...]
    css_class: str
    has_markers: bool = False


@dataclass(frozen=True)
class Box:
    """The rectangle inside a chart in which the data is drawn, in px of the SVG's own coordinates."""

    left_px: float
    top_px: float
    right_px: float
    bottom_px: float


@dataclass(frozen=True)
class BarPart:
    """One part of a bar: its name, its size in the unit of the whole, and its look."""

    name: str
    size: float
    css_class: str


@dataclass(frozen=True)
class BarGroup:
    """What a group of bars shows: its name, and for each bar its size in the unit of the axis and the text at its end.

    A size may be below zero; its bar then goes left.
    """

    name: str
    sizes: tuple[float, ...]
    texts: tuple[str, ...]


def nice_axis(values: Iterable[float], label: str, *, num_ticks: int = 5, from_zero: bool = False) -> Axis:
    """An axis over `values` whose ends and ticks are multiples of 1, 2 or 5 × 10^n.

    Non-finite values are left out. One value, or none, gets a range around it.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        margin = abs(low) * 0.5 or 0.5
        low, high = (low, high + margin) if from_zero else (low - margin, high + margin)
    step = nice_step((high - low) / num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], ticks)


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 5 × 10^n that is at least `rough` (> 0)."""
    magnitude = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5):
        if factor * magnitude >= rough * (1 - 1e-9):
            return factor * magnitude
    return 10 * magnitude


def step_axis(steps: Iterable[float], label: str, *, num_ticks: int = 6) -> Axis:
    """An axis over whole numbers of steps, which ends where the data ends rather than at the next round number."""
    finite = list(steps)
    low, high = (min(finite), max(finite)) if finite else (0, 1)
    if low == high:
        high = low + 1
    step = max(1.0, nice_step((high - low) / num_ticks))
    ticks = tuple(index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Axis(label, low, high, ticks)


def format_tick(value: float) -> str:
    """`value` as short as it can be said without losing a digit of a tick, e.g. `0.25`, `2e-4`, `1,500`."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def position_px(value: float, axis: Axis, start_px: float, end_px: float) -> float:
    """Where `value` lies between `start_px` (the axis' low end) and `end_px` (its high end)."""
    return start_px + (value - axis.low) / (axis.high - axis.low) * (end_px - start_px)


def line_chart(title: str, x_axis: Axis, y_axis: Axis, series: Sequence[Series], *, size_px: tuple[int, int]) -> str:
    """An SVG line chart of `series`, with both axes named and the grid at the ticks of `y_axis`."""
    width_px, height_px = size_px
    label_px = max(len(format_tick(tick)) for tick in y_axis.ticks) * _CHARACTER_WIDTH_PX
    box = Box(label_px + 12, 26, width_px - 14, height_px - 40)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width_px} {height_px}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis-name" x="2" y="12">{escape(y_axis.label)}</text>',
        f'<text class="axis-name" x="{_number(box.right_px)}" y="{height_px - 6}" text-anchor="end">'
        f"{escape(x_axis.label)}</text>",
        *_grid(x_axis, y_axis, box),
    ]
    for line in series:
        parts.extend(_line(line, x_axis, y_axis, box))
    return "".join([*parts, "</svg>"])


def _grid(x_axis: Axis, y_axis: Axis, box: Box) -> list[str]:
    """Horizontal grid lines and the labels of both axes."""
    parts = []
    for tick in y_axis.ticks:
        y = _number(position_px(tick, y_axis, box.bottom_px, box.top_px))
        css_class = "base" if tick == y_axis.low else "grid"
        parts.append(
            f'<line class="{css_class}" x1="{_number(box.left_px)}" x2="{_number(box.right_px)}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{_number(box.left_px - 7)}" y="{y}" dy="4" text-anchor="end">'
            f"{format_tick(tick)}</text>"
        )
    for tick in x_axis.ticks:
        x = _number(position_px(tick, x_axis, box.left_px, box.right_px))
        parts.append(
            f'<text class="tick" x="{x}" y="{_number(box.bottom_px + 16)}" text-anchor="middle">'
            f"{format_tick(tick)}</text>"
        )
    return parts


def _line(series: Series, x_axis: Axis, y_axis: Axis, box: Box) -> list[str]:
    """The polylines of one series (more than one where non-finite values interrupt it), then its dots."""

    def place(point: Point) -> Point:
        x = position_px(point[0], x_axis, box.left_px, box.right_px)
        return x, position_px(point[1], y_axis, box.bottom_px, box.top_px)

    parts = []
    for run in finite_runs(series.points):
        drawn = [place(point) for point in thin_out(run, _MAX_DRAWN_POINTS)]
        coordinates = " ".join(f"{_number(x)},{_number(y)}" for x, y in drawn)
        parts.append(f'<polyline class="line {escape(series.css_class)}" points="{coordinates}"/>')
        if series.has_markers:
            parts.extend(
                f'<circle class="dot {escape(series.css_class)}" cx="{_number(x)}" cy="{_number(y)}" r="3.5">'
                f"<title>{escape(series.name)}, {escape(x_axis.label)} {format_tick(point[0])}: {point[1]:.4g}</title>"
                "</circle>"
                for point in run
                for x, y in [place(point)]
            )
    return parts


def finite_runs(points: Sequence[Point]) -> list[list[Point]]:
    """`points` cut into stretches without a non-finite y."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def thin_out(points: Sequence[Point], max_points: int) -> list[Point]:
    """At most `max_points` of `points`: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= max_points:
        return list(points)
    num_stretches = max_points // 2
    kept = []
    for index in range(num_stretches):
        first = index * len(points) // num_stretches
        stretch = points[first : (index + 1) * len(points) // num_stretches]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept.extend(sorted(extremes))
    return kept


def trailing_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """At each point the mean y of it and up to `window` - 1 finite points before it."""
    means: list[Point] = []
    recent: list[float] = []
    for x, y in points:
        if not math.isfinite(y):
            continue
        recent = [*recent[-(window - 1) :], y] if window > 1 else [y]
        means.append((x, math.fsum(recent) / len(recent)))
    return tuple(means)


def share_bar(
    title: str, parts: Sequence[BarPart], whole: float, *, size_px: tuple[int, int], limit: float | None = None
) -> str:
    """An SVG bar of length `whole` (the same unit as the parts' sizes), filled from the left by `parts` in their order.

    A part that has room for it carries its number in the order, so that the legend can be read without colour. A line
    across the bar marks `limit`.
    """
    width_px, height_px = size_px
    drawn = [
        f'<svg class="chart bar" viewBox="0 0 {width_px} {height_px}" role="img" aria-label="{escape(title)}">'
        f'<rect class="bar-rest" x="0" y="0" width="{width_px}" height="{height_px}" rx="6"/>'
    ]
    left = 0.0
    for number, part in enumerate(parts, 1):
        part_px = part.size / whole * width_px if whole > 0 else 0.0
        drawn.append(
            f'<rect class="{escape(part.css_class)}" x="{_number(left)}" y="0" width="{_number(part_px)}" '
            f'height="{height_px}"><title>{escape(part.name)}</title></rect>'
        )
        if part_px >= 24:
            drawn.append(
                f'<text class="bar-number" x="{_number(left + part_px / 2)}" y="{height_px / 2 + 4:g}" '
                f'text-anchor="middle">{number}</text>'
            )
        left += part_px
    if limit is not None and whole > 0:
        x = _number(limit / whole * width_px)
        drawn.append(f'<line class="bar-limit" x1="{x}" x2="{x}" y1="-5" y2="{height_px + 5}"/>')
    return "".join([*drawn, "</svg>"])


def grouped_bars(
    title: str, axis: Axis, groups: Sequence[BarGroup], series: Sequence[tuple[str, str]], *, width_px: int
) -> str:
    """An SVG chart of lying bars: in each group one for each of `series` (CSS class, name), below the group's name.

    As high as its groups need. `axis` runs from left to right; room is kept for the texts at the bars' ends.
    """
    text_px = max((len(text) for group in groups for text in group.texts), default=0) * _CHARACTER_WIDTH_PX + 8
    group_px = _GROUP_NAME_PX + len(series) * _BAR_PX + _GROUP_GAP_PX
    box = Box(2, 0, width_px - text_px, len(groups) * group_px)
    height_px = box.bottom_px + 36
    drawn = [
        f'<svg class="chart" viewBox="0 0 {width_px} {_number(height_px)}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis-name" x="{_number(box.right_px)}" y="{_number(height_px - 4)}" text-anchor="end">'
        f"{escape(axis.label)}</text>",
    ]
    for tick in axis.ticks:
        x = _number(position_px(tick, axis, box.left_px, box.right_px))
        css_class = "base" if tick == 0 else "grid"
        drawn.append(
            f'<line class="{css_class}" x1="{x}" x2="{x}" y1="0" y2="{_number(box.bottom_px)}"/>'
            f'<text class="tick" x="{x}" y="{_number(box.bottom_px + 15)}" text-anchor="middle">'
            f"{format_tick(tick)}</text>"
        )
    for index, group in enumerate(groups):
        drawn.extend(_group(group, series, axis, replace(box, top_px=index * group_px)))
    return "".join([*drawn, "</svg>"])


def _group(group: BarGroup, series: Sequence[tuple[str, str]], axis: Axis, box: Box) -> list[str]:
    """The name of one group and its bars, from the top of `box` down."""
    zero_px = position_px(0.0, axis, box.left_px, box.right_px)
    drawn = [f'<text class="bar-name" x="{box.left_px + 2}" y="{_number(box.top_px + 13)}">{escape(group.name)}</text>']
    for index, ((css_class, name), size, text) in enumerate(zip(series, group.sizes, group.texts, strict=True)):
        end_px = position_px(size, axis, box.left_px, box.right_px)
        y = box.top_px + _GROUP_NAME_PX + index * _BAR_PX
        drawn.append(
            f'<rect class="{escape(css_class)}" x="{_number(min(zero_px, end_px))}" y="{_number(y)}" '
            f'width="{_number(abs(end_px - zero_px))}" height="{_BAR_PX - 2}">'
            f"<title>{escape(group.name)}, {escape(name)}: {escape(text)}</title></rect>"
            f'<text class="tick" x="{_number(max(zero_px, end_px) + 6)}" y="{_number(y + _BAR_PX - 5)}">'
            f"{escape(text)}</text>"
        )
    return drawn


def _number(value: float) -> str:
    """A coordinate with as many digits as can be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
