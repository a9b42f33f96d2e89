"""A plan as plain lines of at most 80 columns: what is planned, where the memory goes, what it takes, the verdict."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from eightgig.config.values import shown
from eightgig.core.units import format_bytes, format_duration
from eightgig.plan.wording import trade_words
from eightgig.report.wording import format_method

WIDTH_CHARACTERS = 80
_CATEGORY_CHARACTERS = 26
_SIZE_CHARACTERS = 11
_BAR_CHARACTERS = 38
_COLUMN_CHARACTERS = 13
_MEASURED = "measured on this card"
_ON_THE_CARD = "on the card at most"
_UNIT = re.compile(r"\d (GiB|MiB|KiB|B|s|min|h|d)\b")
_UNBROKEN = "\u00a0"  # textwrap breaks at the blanks of ASCII alone


def plan_lines(planned: Mapping[str, Any]) -> Iterator[str]:
    """What `planned` says."""
    yield f"{planned['model']}, {format_method(planned['method'])}"
    yield from _workload_lines(planned["workload"])
    yield ""
    yield from _stack_lines(planned)
    yield ""
    yield from _peak_lines(planned)
    yield from _lever_lines(planned["levers"])
    yield from _time_lines(planned["time"])
    yield from _wrapped(_verdict(planned))
    yield from _alternative_lines(planned["alternatives"])


def compare_lines(compared: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The methods in `compared` side by side; below the table what one of them can't do."""
    plans = {method: planned for method, planned in compared.items() if "error" not in planned}
    first = next(iter(plans.values()))
    yield first["model"]
    yield from _workload_lines(first["workload"])
    yield ""
    yield _row("", {method: "full" if method == "full" else format_method(method) for method in compared})
    categories = dict.fromkeys(name for planned in plans.values() for name in planned["breakdown"])
    for category in categories:
        sizes = {method: planned["breakdown"].get(category, 0) for method, planned in plans.items()}
        yield _row(category, {method: format_bytes(size) if size else "–" for method, size in sizes.items()}, compared)
    peaks = {method: format_bytes(planned["peak"]["device_bytes"]) for method, planned in plans.items()}
    yield _row(_ON_THE_CARD, peaks, compared)
    yield from _time_rows(plans, compared)
    if first["fits"] is not None:
        fits = {method: "fits" if planned["fits"] else "doesn't fit" for method, planned in plans.items()}
        yield _row(f"in {format_bytes(first['budget_bytes'])}", fits, compared)
    yield ""
    if first["gpu"] is not None:
        yield f"{first['gpu']}, {format_bytes(first['budget_bytes'])} of it for this run"
    else:
        yield from _wrapped(_verdict(first))
    if "full" in plans:
        yield "full: every weight but the vision tower's, which stays as it is"
    for method, planned in compared.items():
        if "error" in planned:
            for line in f"{format_method(method)} can't be planned: {planned['error']}".splitlines():
                yield from _wrapped(line)


def _workload_lines(workload: Mapping[str, Any]) -> Iterator[str]:
    """What a micro-batch holds, and of data what decides."""
    samples = _counted(workload["num_samples"], "sample")
    yield (
        f"{samples} at once: {workload['num_tokens']:,} tokens, "
        f"{workload['num_text_tokens']:,} of text and {workload['num_image_tokens']:,} of images"
    )
    data = workload["data"]
    if data is None:
        return
    shown = ", ".join(data["samples"][:2]) + (", ..." if len(data["samples"]) > 2 else "")
    yield from _wrapped(f"decided by the {data['decided_by']}: {shown}")
    yield from _wrapped(
        f"data: {data['num_train_samples']:,} training and {data['num_validation_samples']:,} validation samples, "
        f"{_counted(data['steps_an_epoch'], 'step')} an epoch; {data['mean_tokens']:,.0f} tokens a sample in the "
        f"mean, {data['max_tokens']:,} at most"
    )
    for note in data["notes"]:
        yield from _wrapped(f"note: {note}")


def _stack_lines(planned: Mapping[str, Any]) -> Iterator[str]:
    """The categories as one bar, a segment a line, each beginning where the last one ended; `│` is the budget."""
    device_bytes, budget_bytes = planned["peak"]["device_bytes"], planned["budget_bytes"]
    full_bytes: int = max(device_bytes, budget_bytes or 0)

    def column(num_bytes: int) -> int:
        return round((_BAR_CHARACTERS - 1) * num_bytes / full_bytes)

    def marked(bar: str) -> str:
        if budget_bytes is None:
            return bar
        cells = list(bar.ljust(_BAR_CHARACTERS))
        cells[column(budget_bytes)] = "│"
        return "".join(cells)

    end_bytes = 0
    for category, size in planned["breakdown"].items():
        if not size:
            continue
        start, end_bytes = column(end_bytes), end_bytes + size
        bar = " " * start + "█" * (column(end_bytes) - start)
        yield _stack_line(category, size, marked(bar))
    yield _stack_line(_ON_THE_CARD, device_bytes, marked("█" * column(device_bytes)))
    if budget_bytes is not None:
        yield _stack_line("for this run", budget_bytes, marked(""))


def _stack_line(label: str, size: int, bar: str) -> str:
    return f"{label:<{_CATEGORY_CHARACTERS}}{format_bytes(size):>{_SIZE_CHARACTERS}}  {bar}".rstrip()


def _peak_lines(planned: Mapping[str, Any]) -> Iterator[str]:
    peak = planned["peak"]
    yield from _wrapped(
        f"at the peak ({peak['moment']}) PyTorch allocates {format_bytes(peak['allocated_bytes'])} "
        f"and reserves {format_bytes(peak['reserved_bytes'])}"
    )
    if planned["host_bytes"]:
        yield from _wrapped(f"weights that stay in RAM: {format_bytes(planned['host_bytes'])}")
    phases = (f"{name} {format_bytes(size)}" for name, size in planned["phases"].items())
    yield from _wrapped(f"on the card in each phase: {', '.join(phases)}")


def _lever_lines(levers: list[Mapping[str, Any]]) -> Iterator[str]:
    """What was chosen to make the run fit, or faster; nothing where nothing was."""
    if not levers:
        return
    yield ""
    yield "chosen for this card:"
    for lever in levers:
        text = f"{lever['name']}: {trade_words(lever['saves_bytes'], lever['costs_s'])}; {lever['reason']}"
        yield from textwrap.wrap(
            text, WIDTH_CHARACTERS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    yield ""


def _alternative_lines(alternatives: list[Mapping[str, Any]]) -> Iterator[str]:
    """What would fit instead."""
    if not alternatives:
        return
    yield "what would fit:"
    for alternative in alternatives:
        settings = " ".join(f"--set {path}={shown(value)}" for path, value in alternative["settings"].items())
        step = "" if alternative["step_s"] is None else f", {format_duration(alternative['step_s'])} a step"
        yield f"  {settings}"
        yield from textwrap.wrap(
            f"{format_bytes(alternative['device_bytes'])} on the card{step}; {alternative['price']}",
            WIDTH_CHARACTERS,
            initial_indent="    ",
            subsequent_indent="    ",
        )


def _time_lines(time: Mapping[str, Any] | None) -> Iterator[str]:
    if time is None:
        return
    epoch = "" if time["epoch_s"] is None else f", {format_duration(time['epoch_s'])} an epoch"
    word = "time" if time["basis"] == _MEASURED else "estimated time"
    yield from _wrapped(
        f"{word}: {format_duration(time['step_s'])} a step{epoch}, {time['tokens_per_s']:,.0f} tokens/s "
        f"({time['basis']})"
    )


def _time_rows(plans: Mapping[str, Mapping[str, Any]], compared: Mapping[str, Any]) -> Iterator[str]:
    times = {method: planned["time"] for method, planned in plans.items() if planned["time"] is not None}
    if times:
        is_estimate = any(time["basis"] != _MEASURED for time in times.values())
        label = "step, estimated" if is_estimate else "step"
        yield _row(label, {method: format_duration(time["step_s"]) for method, time in times.items()}, compared)
        yield _row("tokens/s", {method: f"{time['tokens_per_s']:,.0f}" for method, time in times.items()}, compared)


def _row(label: str, cells: Mapping[str, str], columns: Mapping[str, Any] | None = None) -> str:
    """A row of the comparison; a dash where a method has no such number."""
    texts = (cells.get(method, "–") for method in (columns or cells))
    return f"{label:<{_CATEGORY_CHARACTERS}}" + "".join(f"{text:>{_COLUMN_CHARACTERS}}" for text in texts)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _verdict(planned: Mapping[str, Any]) -> str:
    if planned["fits"] is None:
        return "name a card to see whether it fits: --gpu 'RTX 4060', or --vram-gib 8"
    word = "fits" if planned["fits"] else "does not fit"
    return f"{word}: {planned['gpu']}, {format_bytes(planned['budget_bytes'])} of it for this run"


def _wrapped(text: str) -> Iterator[str]:
    """`text` in lines; a path that is longer than a line stays whole, to be copied, and a number keeps its unit."""
    kept = _UNIT.sub(lambda match: match[0].replace(" ", _UNBROKEN), text)
    lines = textwrap.wrap(
        kept, WIDTH_CHARACTERS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    yield from (line.replace(_UNBROKEN, " ") for line in lines)
