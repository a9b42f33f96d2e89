"""Planned beside measured, in words and in memory.json."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eightgig.core.units import GIB, MIB
from eightgig.train.memory_meter import GpuPeaks
from eightgig.train.plan_check import error_text, memory_line, planned_record, spill_line
from eightgig.train.planning import PlannedMemory

PLANNED = PlannedMemory(5 * GIB, 6 * GIB, 6 * GIB + 762 * MIB, {"weights": 5 * GIB, "rest": GIB + 762 * MIB})


def run_of(planned: PlannedMemory | None, peaks: GpuPeaks | None) -> Any:
    """A run of which only its plan and its measured peaks are asked."""
    return SimpleNamespace(planned=planned, meter=SimpleNamespace(gpu_peaks=lambda: peaks))


def peaks(**changes: Any) -> GpuPeaks:
    values = {"allocated_bytes": 5 * GIB, "reserved_bytes": 8 * GIB, "device_bytes": 7 * GIB, "total_bytes": 9 * GIB}
    return GpuPeaks(**values | {"counts_other_programs": False} | changes)


def test_the_line_has_both_and_the_error_of_the_plan() -> None:
    assert memory_line(run_of(PLANNED, peaks())) == (
        "GPU memory: allocated 5.00 GiB (planned 5.00, +0.0 %), reserved 8.00 GiB (planned 6.00, -25.0 %), "
        "device 7.00 GiB (planned 6.74, -3.7 %)"
    )


def test_units_that_differ_are_both_said_and_so_are_other_programs() -> None:
    line = memory_line(run_of(PLANNED, peaks(allocated_bytes=512 * MIB, counts_other_programs=True)))
    assert line is not None
    assert "allocated 512.00 MiB (planned 5.00 GiB, +900.0 %)" in line
    assert line.endswith("; device counts the card's other programs too")


@pytest.mark.parametrize(("planned", "measured"), [(None, peaks()), (PLANNED, None), (None, None)])
def test_with_one_of_them_missing_nothing_is_said_or_kept(
    planned: PlannedMemory | None, measured: GpuPeaks | None
) -> None:
    assert memory_line(run_of(planned, measured)) is None
    assert planned_record(run_of(planned, measured)) == {}


def test_the_record_is_the_plan() -> None:
    assert planned_record(run_of(PLANNED, peaks())) == {
        "planned": {
            "allocated_bytes": 5 * GIB,
            "reserved_bytes": 6 * GIB,
            "device_bytes": 6 * GIB + 762 * MIB,
            "breakdown": {"weights": 5 * GIB, "rest": GIB + 762 * MIB},
        }
    }


@pytest.mark.parametrize(
    ("planned", "measured", "text"), [(101, 100, "+1.0 %"), (99_999, 100_000, "+0.0 %"), (98, 100, "-2.0 %")]
)
def test_the_error_is_in_per_cent_of_what_was_measured(planned: int, measured: int, text: str) -> None:
    assert error_text(planned, measured) == text


def test_what_the_driver_moved_off_the_card_is_said() -> None:
    def run(spilled_bytes: int) -> Any:
        return SimpleNamespace(meter=SimpleNamespace(spilled_bytes=lambda: spilled_bytes))

    assert spill_line(run(0)) is None
    text = spill_line(run(700 * MIB))
    assert text is not None
    assert "at least 700.00 MiB lie in the host's RAM" in text
