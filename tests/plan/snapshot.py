"""Reading what PyTorch's memory history recorded on a real GPU, to replay it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from eightgig.plan.trace import MemoryTrace

ALLOC, FREE, SEGMENT_ALLOC, SEGMENT_FREE, SEGMENT_MAP, SEGMENT_UNMAP = range(6)


class Recording(NamedTuple):
    """One recorded run."""

    trace: MemoryTrace
    peak_reserved_bytes: int
    peak_allocated_bytes: int


def read_snapshot(path: Path, *, keep_releases: bool = True) -> Recording:
    """The recording in an .npz file.

    It must begin before the first allocation and be of one stream. Its arrays, one entry an event:
        action (uint8): 0 alloc, 1 free, 2 segment_alloc, 3 segment_free, 4 segment_map, 5 segment_unmap
        address (uint64)
        size (int64): in bytes; of an allocation as requested, which is what `TraceEntry::ALLOC` holds

    Args:
        path: of the file.
        keep_releases: make each unbroken row of segment_free and segment_unmap one `empty_cache`. A call of it and
            a retry for want of memory look the same in a recording and do the same, so the replay then needs no
            limit. Without it, replay with the limit of the recording.

    Returns:
        The trace; the peak of the segments' bytes; the peak of live bytes, each block rounded up to 512 bytes (that
        is at most torch.cuda.max_memory_allocated, which counts blocks that were not split whole).

    Raises:
        ValueError: a block or a segment is freed that the recording doesn't hold.
    """
    with np.load(path) as arrays:
        events = zip(*(arrays[name].tolist() for name in ("action", "address", "size")), strict=True)
    trace = MemoryTrace()
    live: dict[int, int] = {}
    reserved_bytes = peak_reserved_bytes = 0
    previous = None
    for event, (action, address, size_bytes) in enumerate(events):
        if action == ALLOC:
            live[address] = trace.alloc(size_bytes)
        elif action == FREE:
            if address not in live:
                raise ValueError(f"event {event} frees {address:#x}, which was allocated before the recording began")
            trace.free(live.pop(address))
        elif action in (SEGMENT_ALLOC, SEGMENT_MAP):
            reserved_bytes += size_bytes
            peak_reserved_bytes = max(peak_reserved_bytes, reserved_bytes)
        elif action in (SEGMENT_FREE, SEGMENT_UNMAP):
            reserved_bytes -= size_bytes
            if reserved_bytes < 0:
                raise ValueError(f"event {event} frees a segment from before the recording began")
            if keep_releases and previous not in (SEGMENT_FREE, SEGMENT_UNMAP):
                trace.empty_cache()
        else:
            raise ValueError(f"event {event} has the unknown action {action}")
        previous = action
    peak_allocated_bytes = max(peak for _, peak in trace.live_bytes())
    return Recording(trace, peak_reserved_bytes, peak_allocated_bytes)
