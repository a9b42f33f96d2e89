"""Units of memory and their printing."""

from __future__ import annotations

GIB = 1024**3
MIB = 1024**2


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest binary unit that keeps it at or above one, e.g. `3.76 GiB`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
