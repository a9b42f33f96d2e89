"""What a trace says, read in the plainest way."""

from __future__ import annotations

from eightgig.plan.trace import FREED, MemoryTrace


def left_by(trace: MemoryTrace, phase: str) -> dict[int, int]:
    """The blocks that the first phase of that name allocates and leaves, and their bytes.

    Nothing else may be freed in it.
    """
    first, end = next((first, end) for name, first, end in trace.phases() if name == phase)
    live: dict[int, int] = {}
    for block, size in list(trace)[first:end]:
        if size == FREED:
            live.pop(block)
        else:
            live[block] = size
    return live
