"""The table of cards and models on a terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from eightgig.core.units import format_bytes
from eightgig.report.wording import format_method

WIDTH_CHARACTERS = 100
_NONE = "-"


def matrix_lines(matrix: Mapping[str, Any]) -> Iterator[str]:
    """What `matrix` (`Matrix.to_json()`) says: first by models and sizes of cards, then by cards."""
    yield f"longest data.max_length in tokens, {format_method(matrix['method'])}, preset {matrix['preset']}"
    yield ""
    yield from _table(model_rows(matrix))
    yield ""
    yield from _table(card_rows(matrix))
    yield ""
    yield from _notes(matrix)


def length_text(length_tokens: int | None) -> str:
    """`512`, `2k`; a dash where not even the shortest length fits."""
    if length_tokens is None:
        return _NONE
    return f"{length_tokens // 1024}k" if length_tokens >= 1024 else str(length_tokens)


def model_rows(matrix: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A heading, and a row a model; a column for all cards with one size on the box, with the least that they take."""
    sizes: dict[int, list[str]] = {}
    for gpu in matrix["gpus"]:
        sizes.setdefault(gpu["vram_gb"] or round(gpu["vram_bytes"] / 2**30), []).append(gpu["name"])
    length_of = {(cell["model"], cell["gpu"]): cell["max_length_tokens"] for cell in matrix["cells"]}
    rows: list[tuple[str, ...]] = [("cards of ... GB", *map(str, sorted(sizes)))]
    for model in matrix["models"]:
        columns = ([length_of[model["name"], gpu] for gpu in names] for _, names in sorted(sizes.items()))
        rows.append((model["name"], *map(_size_text, columns)))
    return rows


def _size_text(lengths_tokens: Sequence[int | None]) -> str:
    """The least of the lengths, with a plus where some card takes more."""
    least = min(length or 0 for length in lengths_tokens)
    return length_text(least or None) + ("+" if any((length or 0) > least for length in lengths_tokens) else "")


def card_rows(matrix: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A heading, and a row a card: its memory, how many models it trains, its speed, the middle one over the models."""
    cells_of: dict[str, list[Mapping[str, Any]]] = {gpu["name"]: [] for gpu in matrix["gpus"]}
    for cell in matrix["cells"]:
        cells_of[cell["gpu"]].append(cell)
    rows: list[tuple[str, ...]] = [("card", "memory", "models that fit", "tokens/s", f"× {matrix['reference_gpu']}")]
    for gpu in matrix["gpus"]:
        cells = cells_of[gpu["name"]]
        num_fitting = sum(cell["max_length_tokens"] is not None for cell in cells)
        speeds = [cell["tokens_per_s"] for cell in cells if cell["tokens_per_s"] is not None]
        shares = [cell["relative_speed"] for cell in cells if cell["relative_speed"] is not None]
        rows.append(
            (
                gpu["name"],
                format_bytes(gpu["vram_bytes"]),
                f"{num_fitting} of {len(cells)}",
                f"{median(speeds):,.0f}" if speeds else _NONE,
                f"{median(shares):.2f}" if shares else _NONE,
            )
        )
    return rows


def _notes(matrix: Mapping[str, Any]) -> Iterator[str]:
    ladder = ", ".join(f"{length:,}" for length in matrix["ladder_tokens"])
    notes = [
        f"Tried are {ladder} tokens, as far as a model's positions hold them beside an image; {_NONE}: none fits.",
        "+: a card of that size takes more.",
        f"{format_bytes(matrix['reserve_bytes'])} of each card are kept free.",
    ]
    if any(cell["tokens_per_s"] is not None for cell in matrix["cells"]):
        notes.append(
            f"Speeds are at {matrix['common_tokens']} tokens, estimated, the middle one of the models that fit."
        )
    notes += [f"Left out: {row['model']} ({row['reason']})." for row in matrix["left_out"]]
    for note in notes:
        yield from textwrap.wrap(note, WIDTH_CHARACTERS)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows in columns, the first one left, the others right; a name that is too long is cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = min(widths[0], WIDTH_CHARACTERS - sum(width + 2 for width in widths[1:]))
    for name, *cells in rows:
        shown = name if len(name) <= first else f"{name[: first - 1]}…"
        columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{shown:<{first}}", *columns])
