"""The report of a run: one HTML file that needs nothing but itself."""

from __future__ import annotations

from typing import Any

from eightgig.report.curves import Chart, loss_chart, memory_bar, small_charts
from eightgig.report.pages import page_template
from eightgig.report.planned import planned_part
from eightgig.report.records import RunRecords
from eightgig.report.view import (
    card_total_bytes,
    memory_rows,
    picture_cards,
    quarantine_view,
    setting_sections,
    summary_tiles,
)
from eightgig.report.wording import format_count, format_share, tower_difference_text

_NOT_YET_KNOWN: dict[str, Any] = {  # what run.json lacks of a run that ended early
    "status": "unknown",
    "command": "",
    "reason": None,
    "started_at": None,
    "finished_at": None,
    "eightgig_version": "–",
    "versions": {},
    "device": {"name": "an unknown device", "type": None, "total_bytes": None},
    "precision": {"note": None},
    "num_train_samples": None,
    "num_validation_samples": None,
    "num_cut_prompt_samples": None,
    "num_cut_answer_samples": None,
}


def render_report(run: RunRecords) -> str:
    """The report of `run` as HTML text; a part whose records are missing says so or is left out."""
    cards, num_cards_left_out = picture_cards(run)
    return page_template("template.html.j2").render(
        run=run,
        facts={**_NOT_YET_KNOWN, **run.run},
        tiles=summary_tiles(run),
        loss=loss_chart(run),
        small=small_charts(run),
        memory=_memory_part(run),
        planned=planned_part(run.memory),
        sections=setting_sections(run.config, run.sources),
        cards=cards,
        num_cards_left_out=num_cards_left_out,
        quarantine=quarantine_view(run),
        four_bit=_four_bit_headline(run),
        tower_difference=_tower_difference(run),
    )


def _memory_part(run: RunRecords) -> dict[str, Any] | None:
    """The bar of the memory with its rows; as long as the card (or the process's RAM) where that is known."""
    rows = memory_rows(run)
    if not rows:
        return None
    total_bytes = sum(size for _, size in rows)
    card_bytes = card_total_bytes(run)
    whole_bytes = max(card_bytes or 0, total_bytes)
    bar: Chart = memory_bar(rows, whole_bytes)
    return {
        "bar": bar,
        "rows": [(css, name, size) for (css, name), (_, size) in zip(bar.legend, rows, strict=True)],
        "total_bytes": total_bytes,
        "card_bytes": card_bytes,
        "free_bytes": whole_bytes - total_bytes,
    }


def _tower_difference(run: RunRecords) -> str | None:
    """How much a vision tower in 4 bits changes its features; None where none is, or nothing was measured."""
    difference = None if run.receipt is None else run.receipt.get("tower_difference")
    return None if difference is None else tower_difference_text(difference)


def _four_bit_headline(run: RunRecords) -> str | None:
    """How much of the model is stored in 4 bits, by the receipt's own rows; None without a receipt."""
    if run.receipt is None:
        return None
    total = run.receipt["num_parameters"]
    four_bit = sum(row["num_parameters"] for row in run.receipt["rows"] if row["is_4bit"])
    if four_bit == 0:
        return f"No: all {format_count(total)} parameters are stored in 16 bits or more."
    share = format_share(four_bit / total)
    return f"Yes: {format_count(four_bit)} of {format_count(total)} parameters ({share}) are stored in 4 bits."
