"""The planned memory of a run beside what it took."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eightgig.core.units import format_bytes

if TYPE_CHECKING:
    from eightgig.train.run import Run


def memory_line(run: Run) -> str | None:
    """The run's GPU memory so far beside the planned; None without a plan or a GPU."""
    peaks = run.meter.gpu_peaks() if run.planned is not None else None
    if run.planned is None or peaks is None:
        return None
    parts = [
        _compared("allocated", peaks.allocated_bytes, run.planned.allocated_bytes),
        _compared("reserved", peaks.reserved_bytes, run.planned.reserved_bytes),
        _compared("device", peaks.device_bytes, run.planned.device_bytes),
    ]
    others = "; device counts the card's other programs too" if peaks.counts_other_programs else ""
    return f"GPU memory: {', '.join(parts)}{others}"


def spill_line(run: Run) -> str | None:
    """What to say where PyTorch holds more than the card has; None where it does not.

    Windows' driver then moves memory to the host's RAM without a word, and a step takes many times as long.
    """
    spilled_bytes = run.meter.spilled_bytes()
    if not spilled_bytes:
        return None
    return (
        f"the card is full: at least {format_bytes(spilled_bytes)} lie in the host's RAM, where the driver moved them, "
        "and steps take many times as long; set hardware.cap_gib below the card's memory, so that the run makes do "
        "with it, or 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback' in the NVIDIA control panel"
    )


def planned_record(run: Run) -> dict[str, Any]:
    """What memory.json holds of the plan, where the measured memory is beside it."""
    if run.planned is None or run.meter.gpu_peaks() is None:
        return {}
    return {"planned": asdict(run.planned)}


def error_text(planned_bytes: int, measured_bytes: int) -> str:
    """By how much the plan is off, in per cent of what was measured; `+` where it promised too much."""
    percent = round(100 * (planned_bytes / measured_bytes - 1), 1) + 0.0  # no "-0.0"
    return f"{percent:+.1f} %"


def _compared(name: str, measured_bytes: int, planned_bytes: int) -> str:
    measured, planned = format_bytes(measured_bytes), format_bytes(planned_bytes)
    number, unit = planned.split()
    said = number if measured.endswith(f" {unit}") else planned
    return f"{name} {measured} (planned {said}, {error_text(planned_bytes, measured_bytes)})"
