"""The planned memory of a run beside the measured, by category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.report.curves import Chart, bytes_bars
from eightgig.report.records import Record

SERIES = (("bar-planned", "planned"), ("bar-measured", "measured"))
REST = "activations and temporary"
"""The measured category that holds whatever measuring can't tell apart."""

_PEAKS = (
    ("allocated by PyTorch", "allocated_bytes", "peak_allocated_bytes"),
    ("reserved by PyTorch", "reserved_bytes", "peak_reserved_bytes"),
    ("on the card", "device_bytes", "device_used_bytes"),
)


@dataclass(frozen=True)
class PlannedRow:
    """Bytes planned and measured of one category, or of the whole."""

    name: str
    planned_bytes: int
    measured_bytes: int

    @property
    def difference_bytes(self) -> int:
        """How much too much was planned."""
        return self.planned_bytes - self.measured_bytes

    @property
    def error_text(self) -> str:
        """The difference in per cent of what was measured; a dash where nothing was."""
        if self.measured_bytes <= 0:
            return "–"
        return f"{round(100 * self.difference_bytes / self.measured_bytes, 1) + 0.0:+.1f} %"


@dataclass(frozen=True)
class PlannedPart:
    """The section of the report: bars by category, the rows they are drawn from, and the peaks."""

    bars: Chart
    categories: tuple[PlannedRow, ...]
    peaks: tuple[PlannedRow, ...]


def planned_part(memory: Record | None) -> PlannedPart | None:
    """What memory.json says of the plan; None where the run was not planned or not measured on a GPU."""
    planned = (memory or {}).get("planned")
    if memory is None or planned is None:
        return None
    categories = _categories(planned["breakdown"], memory["categories"])
    rows = [(row.name, (row.planned_bytes, row.measured_bytes)) for row in categories]
    return PlannedPart(
        bars=bytes_bars("Planned and measured memory by category", rows, SERIES),
        categories=categories,
        peaks=tuple(PlannedRow(name, planned[plan_key], memory[key]) for name, plan_key, key in _PEAKS),
    )


def _categories(planned: Mapping[str, int], measured: Mapping[str, Any]) -> tuple[PlannedRow, ...]:
    """The measured categories in their order; planned ones that measuring does not know are part of REST."""
    planned_as_measured = dict.fromkeys(measured, 0)
    for name, size in planned.items():
        key = name if name in planned_as_measured else REST
        planned_as_measured[key] = planned_as_measured.get(key, 0) + size
    rows = (PlannedRow(name, size, measured.get(name) or 0) for name, size in planned_as_measured.items())
    return tuple(row for row in rows if row.planned_bytes or row.measured_bytes)
