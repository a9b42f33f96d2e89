"""A plan as one HTML page: whether it fits, where the memory goes, what it costs in time, with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.core.units import format_bytes, format_duration
from eightgig.plan.phases import phase_word
from eightgig.registry.gpus import all_gpus
from eightgig.report.curves import Chart, bytes_bars, memory_bar
from eightgig.report.pages import page_template
from eightgig.report.view import Tile, setting_sections

_PHASE_SERIES = (("bar-planned", "planned"),)


@dataclass(frozen=True)
class Verdict:
    """Whether it fits: the word that the style sheet colours, and the sentence."""

    status: str
    sentence: str


@dataclass(frozen=True)
class Scale:
    """What the bar of the memory is as long as, where a line crosses it (None: nowhere), and both in words."""

    whole_bytes: int
    limit_bytes: int | None
    note: str


def render_plan(plan: Mapping[str, Any]) -> str:
    """The page of `plan`, which is what `Plan.to_json()` gives, as HTML text."""
    rows = [(name, size) for name, size in plan["breakdown"].items() if size]
    scale = _scale(plan)
    bar = memory_bar(rows, scale.whole_bytes, limit_bytes=scale.limit_bytes)
    return page_template("plan.html.j2").render(
        plan=plan,
        verdict=_verdict(plan),
        tiles=_tiles(plan),
        bar=bar,
        rows=[(css, name, size) for (css, name), (_, size) in zip(bar.legend, rows, strict=True)],
        total_bytes=sum(size for _, size in rows),
        note=scale.note,
        phases=_phases(plan),
        sections=setting_sections(plan["config"], {}),
    )


def _verdict(plan: Mapping[str, Any]) -> Verdict:
    if plan["fits"] is None:
        return Verdict("unknown", "no card named")
    budget_bytes = plan["budget_bytes"]
    spare_bytes = None if budget_bytes is None else budget_bytes - plan["peak"]["device_bytes"]
    if not plan["fits"]:
        if spare_bytes is None or spare_bytes >= 0:  # the card alone would hold it
            return Verdict("failed", "does not fit what hardware.cap_gib allows")
        return Verdict("failed", f"does not fit the {plan['gpu']}: {format_bytes(-spare_bytes)} too much")
    if spare_bytes is None:
        return Verdict("finished", "fits what hardware.cap_gib allows")
    return Verdict("finished", f"fits the {plan['gpu']}, with {format_bytes(spare_bytes)} to spare")


def _tiles(plan: Mapping[str, Any]) -> list[Tile]:
    peak, time = plan["peak"], plan["time"]
    tiles = [
        Tile("On the card at most", format_bytes(peak["device_bytes"]), None, f"in {phase_word(peak['moment'])}"),
        Tile(
            "PyTorch allocates",
            format_bytes(peak["allocated_bytes"]),
            None,
            f"and reserves {format_bytes(peak['reserved_bytes'])}",
        ),
    ]
    if plan["budget_bytes"] is not None:
        tiles.append(Tile("For this run", format_bytes(plan["budget_bytes"]), None, f"of the {plan['gpu']}"))
    if time is not None:
        epoch = "" if time["epoch_s"] is None else f"{format_duration(time['epoch_s'])} an epoch"
        tiles.append(Tile("Time of a step", format_duration(time["step_s"]), None, epoch))
        tiles.append(Tile("Speed", f"{time['tokens_per_s']:,.0f} tokens/s", None, time["basis"]))
    return tiles


def _scale(plan: Mapping[str, Any]) -> Scale:
    """The bar is as long as the card's memory, or as what is planned where that is more."""
    total_bytes, budget_bytes = sum(plan["breakdown"].values()), plan["budget_bytes"]
    card_bytes = next((card.vram_bytes for card in all_gpus() if card.name == plan["gpu"]), None)
    whole_bytes = max(total_bytes, budget_bytes or 0, card_bytes or 0)
    limit_bytes = budget_bytes if budget_bytes is not None and budget_bytes < whole_bytes else None
    sentences = [f"The peak stands in {phase_word(plan['peak']['moment'])}."]
    if card_bytes is not None and card_bytes == whole_bytes:
        sentences.append(f"The whole bar is the card's {format_bytes(card_bytes)}.")
    if limit_bytes is not None:
        sentences.append(f"{format_bytes(limit_bytes)} are for this run, up to the line across the bar.")
    sentences.append("The numbers in the bar are those of the table.")
    return Scale(whole_bytes, limit_bytes, " ".join(sentences))


def _phases(plan: Mapping[str, Any]) -> Chart:
    rows = [(phase_word(name), (size,)) for name, size in plan["phases"].items()]
    return bytes_bars("Peak of each phase", rows, _PHASE_SERIES)
