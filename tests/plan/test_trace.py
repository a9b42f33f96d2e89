"""The trace: what counts as an event, what is refused, and its phases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.plan.trace import CACHE_EMPTIED, FREED, MemoryTrace


def test_events_come_in_the_order_they_were_written() -> None:
    trace = MemoryTrace()
    first = trace.alloc(700)
    second = trace.alloc(5)
    trace.free(first)
    trace.empty_cache()
    third = trace.alloc(6)
    assert [first, second, third] == [0, 1, 2]
    assert list(trace) == [(0, 700), (1, 5), (0, FREED), (-1, CACHE_EMPTIED), (2, 6)]
    assert len(trace) == 5


def test_zero_bytes_are_no_event() -> None:
    trace = MemoryTrace()
    empty = trace.alloc(0)
    full = trace.alloc(1)
    trace.free(empty)
    assert list(trace) == [(full, 1)]
    with pytest.raises(ValueError, match="block 0 is freed twice"):
        trace.free(empty)


@pytest.mark.parametrize("block", [-1, 1, 7])
def test_a_block_never_allocated_can_not_be_freed(block: int) -> None:
    trace = MemoryTrace()
    trace.alloc(1)
    with pytest.raises(ValueError, match=f"block {block} is freed but was never allocated"):
        trace.free(block)
    assert len(trace) == 1


def test_a_block_can_not_be_freed_twice() -> None:
    trace = MemoryTrace()
    block = trace.alloc(1)
    trace.free(block)
    with pytest.raises(ValueError, match="block 0 is freed twice"):
        trace.free(block)
    assert len(trace) == 2


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a block of -1 bytes"):
        MemoryTrace().alloc(-1)


def test_phases_divide_the_events() -> None:
    trace = MemoryTrace()
    assert list(trace.phases()) == [("start", 0, 0)]
    trace.mark("load")
    trace.alloc(1)
    trace.mark("train")
    trace.mark("save")
    trace.alloc(1)
    trace.alloc(1)
    assert list(trace.phases()) == [("load", 0, 1), ("train", 1, 1), ("save", 1, 3)]


def test_events_before_the_first_mark_are_a_phase() -> None:
    trace = MemoryTrace()
    trace.alloc(1)
    trace.mark("load")
    assert list(trace.phases()) == [("start", 0, 1), ("load", 1, 1)]


@given(st.lists(st.one_of(st.integers(0, 5000), st.just(FREED), st.just("mark")), max_size=60), st.randoms())
def test_live_bytes_are_the_peaks_of_what_is_live(steps: list[int | str], rng: object) -> None:
    trace = MemoryTrace()
    live: dict[int, int] = {}
    peaks = [("start", [0])]
    for step in steps:
        if step == "mark":
            trace.mark("next")
            peaks.append(("next", [peaks[-1][1][-1]]))
        elif step == FREED:
            if live:
                block = rng.choice(sorted(live))  # type: ignore[attr-defined]
                trace.free(block)
                del live[block]
        else:
            assert isinstance(step, int)
            live[trace.alloc(step)] = -(-step // 512) * 512
        peaks[-1][1].append(sum(live.values()))
    expected = [(name, max(values)) for name, values in peaks]
    if len(trace.marks) > 0 and trace.marks[0][0] == 0:
        expected = expected[1:]
    assert trace.live_bytes() == expected
