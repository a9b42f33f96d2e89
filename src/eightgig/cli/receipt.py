"""The receipt ("is it really 4-bit?") as plain lines that fit 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.core.units import format_bytes
from eightgig.report.wording import format_count, tower_difference_text

_WIDTH_CHARACTERS = 80
_HEADINGS = ("part", "parameters", "stored as", "4-bit", "at 16 bits", "now")


def receipt_lines(receipt: Mapping[str, Any]) -> list[str]:
    """The receipt with its headline and totals."""
    sizes = map(format_bytes, (receipt["bytes_16bit"], receipt["bytes_now"]))
    totals = ("total", format_count(receipt["num_parameters"]), "", "", *sizes)
    title = textwrap.wrap(f"{receipt['model']}, asked for {receipt['asked']}", _WIDTH_CHARACTERS)
    return [*title, *_aligned([_HEADINGS, *map(_cells, receipt["rows"]), totals]), *_tower_lines(receipt)]


def receipt_rows_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The receipt's rows alone, under their headings."""
    return _aligned([_HEADINGS, *map(_cells, rows)])


def _tower_lines(receipt: Mapping[str, Any]) -> list[str]:
    """How much a vision tower in 4 bits changes its features, where that was measured."""
    difference = receipt.get("tower_difference")
    return textwrap.wrap(tower_difference_text(difference), _WIDTH_CHARACTERS) if difference is not None else []


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["group"]),
        format_count(row["num_parameters"]),
        f"{row['storage_dtype']} in RAM" if row.get("on_host") else str(row["storage_dtype"]),
        "yes" if row["is_4bit"] else "no",
        format_bytes(row["bytes_16bit"]),
        format_bytes(row["bytes_now"]),
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns two spaces apart: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    is_number = (False, True, False, False, True, True)
    lines = []
    for row in rows:
        cells = zip(row, widths, is_number, strict=True)
        lines.append(
            "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
        )
    return lines
