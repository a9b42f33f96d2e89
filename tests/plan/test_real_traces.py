"""The allocator model fed with what PyTorch really did on an H100 (recorded by `benchmarks/traced.py`, 2026-11-24)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.plan.snapshot import read_snapshot

from eightgig.plan.allocator import AllocatorSettings, replay

TRACES = sorted((Path(__file__).parent / "traces").glob("*.npz"))
EXPANDABLE = sorted((Path(__file__).parent / "traces" / "expandable").glob("*.npz"))


@pytest.mark.parametrize("path", TRACES, ids=[path.stem for path in TRACES])
def test_it_reserves_what_pytorch_reserved(path: Path) -> None:
    recording = read_snapshot(path)
    assert len(recording.trace) > 100_000
    result = replay(recording.trace, AllocatorSettings())
    assert result.peak_reserved_bytes == pytest.approx(recording.peak_reserved_bytes, rel=0.01)


@pytest.mark.parametrize("path", EXPANDABLE, ids=[path.stem for path in EXPANDABLE])
def test_it_maps_what_pytorch_mapped_of_segments_that_grow(path: Path) -> None:
    recording = read_snapshot(path)
    assert len(recording.trace) > 100_000
    result = replay(recording.trace, AllocatorSettings(expandable_segments=True))
    assert result.peak_reserved_bytes == recording.peak_reserved_bytes
    assert result.peak_allocated_bytes == recording.peak_allocated_bytes
