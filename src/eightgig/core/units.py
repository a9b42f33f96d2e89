"""Units of memory and time, and their printing."""

from __future__ import annotations

GIB = 1024**3
MIB = 1024**2


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest binary unit that keeps it at or above one, e.g. `3.76 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def format_duration(duration_s: float) -> str:
    """`duration_s` in its two largest units, e.g. `3 min 42 s`, `1 h 05 min`; below a minute to a tenth of a second."""
    if duration_s < 59.95:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"
