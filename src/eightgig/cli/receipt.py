"""The receipt ("is it really 4-bit?") as plain lines that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.core.units import format_bytes
from eightgig.report.wording import format_count

_HEADINGS = ("part", "parameters", "stored as", "4-bit", "at 16 bits", "now")
_MAX_PART_CHARACTERS = 26


def receipt_lines(receipt: Mapping[str, Any]) -> list[str]:
    """The receipt with its headline and totals."""
    totals = ("total", "", "", "", *map(format_bytes, (receipt["total_bytes_16bit"], receipt["total_bytes_now"])))
    title = f"{receipt['model']}: {receipt['quantization']}"
    return [title, *_aligned([_HEADINGS, *map(_cells, receipt["rows"]), totals])]


def receipt_rows_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The receipt's rows alone, under their headings."""
    return _aligned([_HEADINGS, *map(_cells, rows)])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    part = str(row["group"])
    return (
        part if len(part) <= _MAX_PART_CHARACTERS else part[: _MAX_PART_CHARACTERS - 1] + "…",
        format_count(row["num_parameters"]),
        str(row["dtype"]).removeprefix("torch."),
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
