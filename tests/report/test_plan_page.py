"""The page of a plan says the plan's numbers, draws them to scale, and needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_pages import GIB, MIB, PLAN
from report_page import Page

from eightgig.app.reporting import write_plan_page
from eightgig.registry.gpus import get_gpu
from eightgig.report.plan_page import render_plan


def page_of(**changes: Any) -> Page:
    """The parsed page of PLAN with changes."""
    return Page(render_plan(PLAN | changes))


def bar_parts(page: Page) -> list[float]:
    """Widths of the bar's parts on a wide screen, where it is 1,000 px long."""
    parts = [rect for rect in page.attributes("rect") if (rect["class"] or "").startswith("part ") and "x" in rect]
    return [float(rect["width"] or 0) for rect in parts[: len(parts) // 2]]


def test_every_category_stands_there_and_they_add_up() -> None:
    page = page_of()
    assert page.open_tags == []
    text = page.text("memory")
    assert sum(PLAN["breakdown"].values()) == PLAN["peak"]["device_bytes"]
    for name, size in PLAN["breakdown"].items():
        assert (f"{name} {size:,} " in text) is (size > 0)
    assert f"total {6 * GIB:,} 6.00 GiB 100 %" in text
    assert "The peak stands in training." in text


def test_the_bar_is_drawn_against_the_cards_memory_with_a_line_at_the_budget() -> None:
    page = page_of()
    card_bytes = get_gpu("RTX 4060").vram_bytes
    sizes = [size for size in PLAN["breakdown"].values() if size]
    assert bar_parts(page) == pytest.approx([1000 * size / card_bytes for size in sizes], abs=0.01)
    limits = [line for line in page.attributes("line") if line.get("class") == "bar-limit"]
    assert float(limits[0]["x1"] or 0) == pytest.approx(1000 * PLAN["budget_bytes"] / card_bytes, abs=0.01)
    assert f"The whole bar is the card's {card_bytes / GIB:.2f} GiB. 7.00 GiB are for this run" in page.text("memory")


def test_what_does_not_fit_goes_beyond_the_line() -> None:
    page = page_of(fits=False, gpu="4 GiB card", budget_bytes=4 * GIB)
    assert "does not fit the 4 GiB card: 2.00 GiB too much" in page.text()
    assert sum(bar_parts(page)) == pytest.approx(1000, abs=0.1)
    limits = [line for line in page.attributes("line") if line.get("class") == "bar-limit"]
    assert float(limits[0]["x1"] or 0) == pytest.approx(1000 * 4 / 6, abs=0.01)


def test_a_budget_that_is_all_there_is_has_no_line() -> None:
    page = page_of(gpu="7 GiB card")
    assert not any(line.get("class") == "bar-limit" for line in page.attributes("line"))
    assert "fits the 7 GiB card, with 1.00 GiB to spare" in page.text()


def test_without_a_card_nothing_is_said_of_fitting() -> None:
    page = page_of(gpu=None, budget_bytes=None, fits=None)
    assert "no card named" in page.text()
    assert "For this run" not in page.text()
    assert sum(bar_parts(page)) == pytest.approx(1000, abs=0.1)


@pytest.mark.parametrize(("fits", "said"), [(True, "fits what"), (False, "does not fit what")])
def test_a_cap_without_a_card_is_spoken_of_as_such(fits: bool, said: str) -> None:
    assert f"{said} hardware.cap_gib allows" in page_of(gpu=None, budget_bytes=None, fits=fits).text()


def test_what_the_card_holds_and_the_cap_does_not_is_laid_to_the_cap() -> None:
    assert "does not fit what hardware.cap_gib allows" in page_of(fits=False).text()


def test_phases_are_bars_of_their_own() -> None:
    page = page_of()
    text = page.text("phases")
    for name, size in (("loading", 4), ("validation", 5), ("training", 6)):
        assert f"{name} {name}, planned: {size}.00 GiB {size}.00 GiB" in text  # name, for the pointer, at the bar's end
    widths = [float(rect["width"] or 0) for rect in page.attributes("rect") if rect["class"] == "bar-planned"][:3]
    assert widths == pytest.approx([widths[2] * 4 / 6, widths[2] * 5 / 6, widths[2]], abs=0.02)


def test_levers_stand_with_what_they_save_cost_and_why() -> None:
    lever = {"name": "cpu_offload", "saves_bytes": 700 * MIB, "costs_s": 1.25, "reason": "the <tower> is idle"}
    text = page_of(levers=(lever,)).text("levers")
    assert "cpu_offload 700.00 MiB 1.2 s the <tower> is idle" in text
    assert "cpu_offload 700.00 MiB – the <tower> is idle" in page_of(levers=(lever | {"costs_s": None},)).text("levers")
    assert "Nothing: the settings below are as they were asked for." in page_of().text("levers")


def test_time_is_said_with_its_basis() -> None:
    time = {"step_s": 4.5, "epoch_s": 3900.0, "tokens_per_s": 7703.2, "basis": "estimated from the card's data sheet"}
    page = page_of(time=time)
    assert "4.5 s a step, 1 h 05 min an epoch, 7,703 tokens/s: estimated from the card's data sheet." in page.text(
        "time"
    )
    assert "Time of a step 4.5 s 1 h 05 min an epoch Speed 7,703 tokens/s estimated" in page.text()
    text = page_of(time=time | {"epoch_s": None}).text("time")
    assert "4.5 s a step, 7,703 tokens/s" in " ".join(text.split())
    assert "Not predicted" in page_of().text("time")


def test_settings_and_workload_stand_there() -> None:
    page = page_of()
    assert "QLoRA · 2 samples with 2,176 tokens at once" in page.text()
    assert "max_length 512 val_path none" in page.text("settings")


def test_the_file_is_whole_escaped_and_fetches_nothing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    path = write_plan_page(tmp_path / "pages" / "plan.html", PLAN | {"model": evil, "gpu": evil})
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert evil in page.text()
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    assert "url(" not in html
    assert [file.name for file in path.parent.iterdir()] == ["plan.html"]
