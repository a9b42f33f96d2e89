"""From records to what the report shows: tiles, rows and cards, as plain text. The template only places them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.core.units import format_bytes, format_duration
from eightgig.report.pictures import thumbnail_uri
from eightgig.report.records import Record, RunRecords
from eightgig.report.wording import format_count, format_number, format_share

MAX_PICTURES = 24  # keeps the file far below 5 MB: a 256 px JPEG is 5 to 20 kB
_MAX_QUARANTINE_ROWS = 10


@dataclass(frozen=True)
class Tile:
    """One number of the summary: what it is, its value (before an arrow and after it), and a line below."""

    name: str
    value: str
    before: str | None
    detail: str


@dataclass(frozen=True)
class SettingRow:
    """One setting: its name within its section, its value and where that came from."""

    name: str
    value: str
    source: str
    is_default: bool


@dataclass(frozen=True)
class Answer:
    """An answer of the model at one moment; `is_correct` is None where there was nothing to compare with."""

    moment: str
    text: str
    is_correct: bool | None


@dataclass(frozen=True)
class PictureCard:
    """A validation sample: its pictures (address, or None where unreadable; path), question and answers."""

    pictures: tuple[tuple[str | None, str], ...]
    question: str
    expected: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class QuarantineView:
    """What was left out of the data: how often for which reason, and the first rows."""

    num_samples: int
    by_code: tuple[tuple[str, int], ...]
    rows: tuple[Record, ...]


def summary_tiles(records: RunRecords) -> list[Tile]:
    """The numbers on top, of which only those that were measured."""
    tiles = [_quality_tile(records), _loss_tile(records), _time_tile(records), _speed_tile(records)]
    tiles += [_parameters_tile(records), _memory_tile(records)]
    return [tile for tile in tiles if tile is not None]


def before_and_after(validations: Sequence[Record], key: str) -> tuple[float | None, float | None]:
    """`key` of the validation before the first step and of the last one after it; None where it was not measured."""
    measured = [(record["step"], record[key]) for record in validations if record.get(key) is not None]
    before = [value for step, value in measured if step == 0]
    after = [value for step, value in measured if step > 0]
    return (before[0] if before else None), (after[-1] if after else None)


def _quality_tile(records: RunRecords) -> Tile | None:
    before, after = before_and_after(records.validations, "exact_match")
    if before is None and after is None:
        return None
    generated = [record["num_generated"] for record in records.validations if record.get("num_generated")]
    detail = f"of {generated[-1]:,} validation samples answered in words" if generated else ""
    if after is None:
        return Tile("Exact match", format_share(before), None, f"before training, {detail}")
    return Tile("Exact match", format_share(after), format_share(before), detail)


def _loss_tile(records: RunRecords) -> Tile | None:
    if not records.steps:
        return None
    first, last = records.steps[0], records.steps[-1]
    before, after = before_and_after(records.validations, "loss")
    detail = f"step {first['step']} to step {last['step']}"
    if after is not None:
        detail = f"validation loss {format_number(before)} → {format_number(after)}"
    return Tile("Training loss", format_number(last["loss"]), format_number(first["loss"]), detail)


def _time_tile(records: RunRecords) -> Tile | None:
    train_s, done = records.run.get("train_s"), records.run.get("steps_done")
    if train_s is None:
        return None
    return Tile("Training time", format_duration(train_s), None, f"{done:,} of {records.run['steps_planned']:,} steps")


def _speed_tile(records: RunRecords) -> Tile | None:
    step_s = sum(record["step_s"] for record in records.steps)
    if step_s <= 0:
        return None
    tokens_per_s = sum(record["num_tokens"] for record in records.steps) / step_s
    images_per_s = sum(record["num_images"] for record in records.steps) / step_s
    waiting = sum(record["data_wait_s"] for record in records.steps) / step_s
    detail = f"{images_per_s:.3g} images/s, {format_share(waiting)} waiting for data"
    return Tile("Speed", f"{tokens_per_s:,.0f} tokens/s", None, detail)


def _parameters_tile(records: RunRecords) -> Tile | None:
    trainable, total = records.run.get("num_trainable_parameters"), records.run.get("num_parameters")
    if trainable is None or not total:
        return None
    detail = f"{100 * trainable / total:.3g} % of {format_count(total)}"
    return Tile("Trainable parameters", format_count(trainable), None, detail)


def _memory_tile(records: RunRecords) -> Tile | None:
    memory = records.memory or {}
    allocated, host = memory.get("peak_allocated_bytes"), memory.get("host_peak_rss_bytes")
    if not _is_on_gpu(records):
        return None if host is None else Tile("Peak memory", format_bytes(host), None, "RAM of the process")
    if allocated is None:
        return None
    parts = [("reserved by PyTorch", memory.get("peak_reserved_bytes")), ("RAM", host)]
    detail = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts if size is not None)
    return Tile("Peak memory", format_bytes(allocated), None, detail)


def memory_rows(records: RunRecords) -> list[tuple[str, int]]:
    """The categories of the memory at the peak with their bytes, largest first; those without bytes are left out.

    On the CPU the rest of the process's peak RAM is one more category: it can't be told apart further.
    """
    memory = records.memory or {}
    categories: Mapping[str, int | None] = memory.get("categories", {})
    rows = sorted(((name, size) for name, size in categories.items() if size), key=lambda row: -row[1])
    rest = (memory.get("host_peak_rss_bytes") or 0) - sum(size for _, size in rows)
    if rows and rest > 0 and not _is_on_gpu(records):
        rows.append(("activations, data, libraries and all else", rest))
    return rows


def card_total_bytes(records: RunRecords) -> int | None:
    """The memory of the graphics card of the run, None where it ran on the CPU or where that was not recorded."""
    if not _is_on_gpu(records):
        return None
    total_bytes = records.run["device"].get("total_bytes") or (records.memory or {}).get("device_total_bytes")
    return None if total_bytes is None else int(total_bytes)


def _is_on_gpu(records: RunRecords) -> bool:
    return bool(records.run.get("device", {}).get("type") == "cuda")


def setting_sections(config: Record, sources: Mapping[str, str]) -> list[tuple[str, list[SettingRow]]]:
    """Every setting by section, in the configuration's order, with where its value came from where that is known."""
    sections: dict[str, list[SettingRow]] = {}
    for path, value in _flatten(config):
        section, _, name = path.partition(".")
        source = _source_of(path, sources)
        row = SettingRow(
            name or section, _setting_text(value), source, source in ("default", "") or source.startswith("follows ")
        )
        sections.setdefault(section if name else "general", []).append(row)
    return list(sections.items())


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of a nested mapping with their dotted paths."""
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _source_of(path: str, sources: Mapping[str, str]) -> str:
    """Where the value at `path` came from: its own entry, or that of the nearest section above it."""
    while path not in sources and "." in path:
        path = path.rpartition(".")[0]
    return sources.get(path, "")


def _setting_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def picture_cards(records: RunRecords) -> tuple[list[PictureCard], int]:
    """A card for each validation sample until MAX_PICTURES pictures are placed, and how many samples got none."""
    by_sample: dict[str, list[Record]] = {}
    for row in records.generations:
        by_sample.setdefault(str(row["sample_id"]), []).append(row)
    last_step = max((int(row["step"]) for row in records.generations), default=0)
    cards: list[PictureCard] = []
    num_pictures = 0
    for rows in by_sample.values():
        paths = [Path(path) for path in rows[-1].get("images", [])]
        num_pictures += len(paths)
        if num_pictures > MAX_PICTURES or len(cards) == MAX_PICTURES:
            break
        cards.append(
            PictureCard(
                pictures=tuple((thumbnail_uri(path), str(path)) for path in paths),
                question=str(rows[-1]["question"]),
                expected=str(rows[-1]["expected"]),
                answers=_first_and_last(rows, last_step, is_finished=records.run.get("status") == "finished"),
            )
        )
    return cards, len(by_sample) - len(cards)


def _first_and_last(rows: Sequence[Record], last_step: int, *, is_finished: bool) -> tuple[Answer, ...]:
    """The answers before the first step and at the last validation, whichever there are."""
    chosen = [rows[0], rows[-1]] if len(rows) > 1 else [rows[0]]
    answers = []
    for row in chosen:
        moment = f"at step {row['step']}"
        if row["step"] == 0:
            moment = "before training"
        elif is_finished and row["step"] == last_step:
            moment = "after training"
        answers.append(Answer(moment, str(row["answer"]), row.get("correct")))
    return tuple(answers)


def quarantine_view(records: RunRecords) -> QuarantineView:
    """How many samples were left out, why, and the first of them."""
    counts = Counter(str(row.get("code", "unknown")) for row in records.quarantine)
    return QuarantineView(
        num_samples=len(records.quarantine),
        by_code=tuple(counts.most_common()),
        rows=records.quarantine[:_MAX_QUARANTINE_ROWS],
    )
