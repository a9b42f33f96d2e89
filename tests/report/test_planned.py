"""Planned beside measured: the same categories, nothing lost on the way, and bars as long as their bytes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_page import Page
from report_run_folders import MEMORY, PLANNED, write_run

from eightgig.report.charts import Axis, BarGroup, grouped_bars
from eightgig.report.html import render_report
from eightgig.report.planned import REST, PlannedRow, planned_part
from eightgig.report.records import read_run

SIZES = st.integers(0, 10**10)
NAMES = st.sampled_from([*MEMORY["categories"], "logits and loss", "vision tower", "recomputed layer"])


def test_planned_categories_that_measuring_does_not_know_are_part_of_the_rest() -> None:
    part = planned_part(MEMORY | {"planned": PLANNED})
    assert part is not None
    assert [row.name for row in part.categories] == list(MEMORY["categories"])
    rest = next(row for row in part.categories if row.name == REST)
    assert rest == PlannedRow(REST, 500_000_000 + 373_901_888, 929_901_888)
    assert rest.difference_bytes == -56_000_000


@given(
    planned=st.dictionaries(NAMES, SIZES), measured=st.dictionaries(st.sampled_from(list(MEMORY["categories"])), SIZES)
)
def test_no_byte_is_lost(planned: dict[str, int], measured: dict[str, int]) -> None:
    part = planned_part(MEMORY | {"categories": measured, "planned": PLANNED | {"breakdown": planned}})
    assert part is not None
    assert sum(row.planned_bytes for row in part.categories) == sum(planned.values())
    assert sum(row.measured_bytes for row in part.categories) == sum(measured.values())


@pytest.mark.parametrize(
    ("planned", "measured", "text"), [(99, 100, "-1.0 %"), (100_001, 100_000, "+0.0 %"), (5, 0, "–"), (3, 2, "+50.0 %")]
)
def test_the_error_of_a_plan(planned: int, measured: int, text: str) -> None:
    assert PlannedRow("a", planned, measured).error_text == text


def test_the_report_draws_both_and_says_the_errors(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "memory.json").write_text(json.dumps(MEMORY | {"planned": PLANNED}))
    page = Page(render_report(read_run(folder)))
    text = page.text("plan")
    assert page.open_tags == []
    assert "allocated by PyTorch 5.16 GiB 5.22 GiB -1.0 %" in text
    assert "reserved by PyTorch 5.46 GiB 5.40 GiB +1.0 %" in text
    assert "on the card 5.83 GiB 5.77 GiB +1.0 %" in text
    assert "4-bit weights 3.11 GiB 3.11 GiB 0 B" in text
    bars = [rect for rect in page.attributes("rect") if rect.get("class") == "bar-planned" and "x" in rect]
    assert len(bars) == 2 * len(MEMORY["categories"]), "one for each category, on wide and on narrow screens"
    lengths = {rect["width"] for rect in bars}
    assert len(lengths) > 8


@pytest.mark.parametrize("memory", [MEMORY, None])
def test_without_a_plan_there_is_no_such_section(tmp_path: Path, memory: object) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "memory.json").write_text(json.dumps(memory or {}))
    page = Page(render_report(read_run(folder)))
    assert "plan" not in page.text_of
    assert "memory" in page.text_of


def test_bars_are_as_long_as_their_sizes_and_start_at_zero() -> None:
    groups = [BarGroup("<weights>", (8.0, 4.0), ("8", "4")), BarGroup("rest", (-2.0, 0.0), ("-2", "0"))]
    series = (("bar-planned", "planned"), ("bar-measured", "measured"))
    # Two characters (14 px) and 8 px are kept for the texts: the axis spans x 2..322, 32 px a unit, zero at 66.
    svg = ET.fromstring(grouped_bars("Memory", Axis("GiB", -2, 8, (-2, 0, 4, 8)), groups, series, width_px=344))
    bars = [(float(r.attrib["x"]), float(r.attrib["width"]), r.attrib["class"]) for r in svg.iter("rect")]
    assert bars == [
        (66, 256, "bar-planned"),
        (66, 128, "bar-measured"),
        (2, 64, "bar-planned"),
        (66, 0, "bar-measured"),
    ]
    tops = [float(rect.attrib["y"]) for rect in svg.iter("rect")]
    assert tops == sorted(tops)
    assert svg.find("rect/title").text == "<weights>, planned: 8"  # type: ignore[union-attr]
