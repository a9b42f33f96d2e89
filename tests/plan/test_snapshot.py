"""The reader of recorded traces, on recordings made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.plan import snapshot
from tests.plan.snapshot import read_snapshot

from eightgig.plan.allocator import AllocatorSettings, replay
from eightgig.plan.trace import CACHE_EMPTIED, FREED

MIB = 2**20


def write(path: Path, events: list[tuple[int, int, int]]) -> Path:
    action, address, size = zip(*events, strict=True)
    np.savez(
        path,
        action=np.array(action, np.uint8),
        address=np.array(address, np.uint64),
        size=np.array(size, np.int64),
    )
    return path


BASE = 0x7F0000000000
RETRIED = [
    (snapshot.SEGMENT_ALLOC, BASE, 20 * MIB),
    (snapshot.ALLOC, BASE, 20 * MIB - 7),
    (snapshot.SEGMENT_ALLOC, BASE + 64 * MIB, 12 * MIB),
    (snapshot.ALLOC, BASE + 64 * MIB, 12 * MIB),
    (snapshot.FREE, BASE, 20 * MIB - 7),
    (snapshot.FREE, BASE + 64 * MIB, 12 * MIB),
    (snapshot.SEGMENT_FREE, BASE, 20 * MIB),
    (snapshot.SEGMENT_FREE, BASE + 64 * MIB, 12 * MIB),
    (snapshot.SEGMENT_ALLOC, BASE, 30 * MIB),
    (snapshot.ALLOC, BASE, 30 * MIB),
]


def test_a_recording_becomes_a_trace(tmp_path: Path) -> None:
    trace, peak_reserved_bytes, peak_allocated_bytes = read_snapshot(write(tmp_path / "run.npz", RETRIED))
    assert list(trace) == [
        (0, 20 * MIB - 7),
        (1, 12 * MIB),
        (0, FREED),
        (1, FREED),
        (-1, CACHE_EMPTIED),
        (2, 30 * MIB),
    ]
    assert (peak_reserved_bytes, peak_allocated_bytes) == (32 * MIB, 32 * MIB)


def test_a_retry_is_replayed_with_or_without_its_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "run.npz", RETRIED)
    kept = read_snapshot(path)
    result = replay(kept.trace, AllocatorSettings())
    assert (result.peak_reserved_bytes, result.num_alloc_retries) == (kept.peak_reserved_bytes, 0)
    left_out = read_snapshot(path, keep_releases=False)
    result = replay(left_out.trace, AllocatorSettings(limit_bytes=40 * MIB))
    assert (result.peak_reserved_bytes, result.num_alloc_retries) == (left_out.peak_reserved_bytes, 1)


def test_pages_count_as_segments_do(tmp_path: Path) -> None:
    events = [
        (snapshot.SEGMENT_MAP, BASE, 20 * MIB),
        (snapshot.ALLOC, BASE, 5 * MIB),
        (snapshot.SEGMENT_MAP, BASE + 20 * MIB, 20 * MIB),
        (snapshot.ALLOC, BASE + 5 * MIB, 30 * MIB),
        (snapshot.FREE, BASE, 5 * MIB),
        (snapshot.FREE, BASE + 5 * MIB, 30 * MIB),
        (snapshot.SEGMENT_UNMAP, BASE, 40 * MIB),
        (snapshot.SEGMENT_MAP, BASE, 20 * MIB),
        (snapshot.ALLOC, BASE, 5 * MIB),
    ]
    recording = read_snapshot(write(tmp_path / "run.npz", events))
    assert recording.peak_reserved_bytes == 40 * MIB
    result = replay(recording.trace, AllocatorSettings(expandable_segments=True))
    assert result.peak_reserved_bytes == 40 * MIB


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([(snapshot.FREE, BASE, 512)], "event 0 frees 0x7f0000000000, which was allocated before the recording began"),
        ([(snapshot.SEGMENT_FREE, BASE, 2 * MIB)], "event 0 frees a segment from before the recording began"),
        ([(9, BASE, 512)], "event 0 has the unknown action 9"),
    ],
)
def test_a_recording_that_began_late_is_refused(
    tmp_path: Path, events: list[tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_snapshot(write(tmp_path / "run.npz", events))
