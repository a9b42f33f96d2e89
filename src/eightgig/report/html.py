"""The report of a run: one HTML file that needs nothing but itself."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from eightgig.core.units import format_bytes
from eightgig.report.curves import Chart, loss_chart, memory_bar, small_charts
from eightgig.report.records import RunRecords
from eightgig.report.view import (
    card_total_bytes,
    memory_rows,
    picture_cards,
    quarantine_view,
    setting_sections,
    summary_tiles,
)
from eightgig.report.wording import format_count, format_method, format_moment, format_number, format_share

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
    return _template().render(
        run=run,
        facts={**_NOT_YET_KNOWN, **run.run},
        tiles=summary_tiles(run),
        loss=loss_chart(run),
        small=small_charts(run),
        memory=_memory_part(run),
        sections=setting_sections(run),
        cards=cards,
        num_cards_left_out=num_cards_left_out,
        quarantine=quarantine_view(run),
        four_bit=_four_bit_headline(run),
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


@cache
def _template() -> jinja2.Template:
    """The page, with everything that is put into it escaped unless it is SVG or CSS of our own."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_package_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=format_bytes,
        count=format_count,
        method=format_method,
        moment=format_moment,
        number=format_number,
        share=format_share,
    )
    environment.globals.update(style=Markup(_package_text("style.css")), svg=Markup)
    return environment.get_template("template.html.j2")


def _package_text(name: str) -> str:
    """The text of a file that lies beside this module."""
    return (files("eightgig.report") / name).read_text(encoding="utf-8")
