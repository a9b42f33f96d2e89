"""Replays of whole traces: phases, the end of memory, and any trace against a naive model of the allocator."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.plan.naive_allocator import NaiveAllocator

from eightgig.plan.allocator import AllocatorSettings, CachingAllocator, OutOfMemory, PhasePeak, replay
from eightgig.plan.blocks import ALLOCATED, FREE, UNMAPPED, Block, ExpandablePool
from eightgig.plan.trace import CACHE_EMPTIED, FREED, MemoryTrace

KIB = 2**10
MIB = 2**20

Operation = tuple[str, int]


def held(allocator: CachingAllocator) -> tuple[int, int]:
    """Allocated and reserved bytes."""
    return allocator.allocated_bytes, allocator.device.reserved_bytes


@pytest.mark.parametrize("expandable_segments", [False, True])
def test_peaks_begin_anew_with_each_phase(expandable_segments: bool) -> None:
    trace = MemoryTrace()
    weights = trace.alloc(40 * MIB)
    trace.mark("train")
    trace.free(trace.alloc(20 * MIB))
    trace.mark("save")
    trace.empty_cache()
    trace.mark("train")
    trace.free(weights)
    result = replay(trace, AllocatorSettings(expandable_segments=expandable_segments))
    assert result.phases == (
        PhasePeak("start", 40 * MIB, 40 * MIB),
        PhasePeak("train", 60 * MIB, 60 * MIB),
        PhasePeak("save", 40 * MIB, 60 * MIB),
        PhasePeak("train", 40 * MIB, 40 * MIB),
    )
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (60 * MIB, 60 * MIB)
    assert (result.num_alloc_retries, result.out_of_memory) == (0, None)


def test_the_replay_ends_where_memory_runs_out() -> None:
    trace = MemoryTrace()
    trace.mark("load")
    trace.alloc(0)
    trace.free(trace.alloc(12 * MIB))
    trace.alloc(20 * MIB)
    trace.mark("train")
    trace.alloc(20 * MIB - 100)
    trace.mark("save")
    result = replay(trace, AllocatorSettings(limit_bytes=39 * MIB))
    assert result.out_of_memory == OutOfMemory(event=3, requested_bytes=20 * MIB - 100)
    assert result.num_alloc_retries == 1
    assert [phase.name for phase in result.phases] == ["load", "train"]
    assert result.peak_reserved_bytes == 32 * MIB


def test_an_empty_trace_takes_nothing() -> None:
    assert replay(MemoryTrace(), AllocatorSettings()).phases == (PhasePeak("start", 0, 0),)


SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 64 * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB - 512, 10 * MIB, 11 * MIB, 12 * MIB, 19 * MIB, 20 * MIB, 40 * MIB]),
)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), SIZES),
        st.tuples(st.just("alloc"), SIZES),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("empty_cache"), st.just(0)),
    ),
    max_size=80,
)
LIMITS = st.one_of(st.none(), st.integers(1, 200).map(lambda pages: pages * 2 * MIB))


def long_operations(seed: int, num_operations: int) -> list[Operation]:
    rng = random.Random(seed)
    usual = [int(2 ** rng.uniform(5, 26)) for _ in range(12)]
    operations: list[Operation] = []
    for _ in range(num_operations):
        kind = rng.choices(["alloc", "free", "empty_cache"], [50, 45, 1])[0]
        size = rng.choice(usual) if rng.random() < 0.7 else int(2 ** rng.uniform(0, 26))
        operations.append((kind, size if kind == "alloc" else rng.randrange(10**6)))
    return operations


def trace_of(operations: list[Operation]) -> MemoryTrace:
    trace = MemoryTrace()
    live: list[int] = []
    for index, (kind, value) in enumerate(operations):
        if index % 20 == 10:
            trace.mark(f"phase {index}")
        if kind == "alloc":
            live.append(trace.alloc(value))
        elif kind == "empty_cache":
            trace.empty_cache()
        elif live:
            trace.free(live.pop(value % len(live)))
    return trace


def assert_sound(allocator: CachingAllocator, used: list[Block]) -> None:
    """The blocks tile their segments without overlap, neighbours are merged, and the sums are right."""
    free = [block for pool in allocator.pools for block in pool.free.in_order()]
    unmapped = [
        block for pool in allocator.pools if isinstance(pool, ExpandablePool) for block in pool.unmapped.in_order()
    ]
    for blocks, state in ((used, ALLOCATED), (free, FREE), (unmapped, UNMAPPED)):
        assert all(block.state == state for block in blocks)
    everything = sorted([*used, *free, *unmapped], key=lambda block: block.address)
    for block, following in itertools.pairwise(everything):
        assert block.address + block.size_bytes <= following.address
    for block in everything:
        following = block.next
        if following is not None:
            assert following.previous is block
            assert block.address + block.size_bytes == following.address
            assert block.state == ALLOCATED or block.state != following.state
    allocated_bytes, reserved_bytes = held(allocator)
    assert allocated_bytes == sum(block.size_bytes for block in used)
    assert reserved_bytes == allocated_bytes + sum(block.size_bytes for block in free)
    assert reserved_bytes % (2 * MIB) == 0
    assert reserved_bytes <= allocator.device.limit_bytes


def assert_as_in_the_naive_model(operations: list[Operation], settings: AllocatorSettings) -> None:
    allocator = CachingAllocator(settings)
    naive = NaiveAllocator(
        expandable=settings.expandable_segments, limit=settings.limit_bytes, card=settings.card_bytes
    )
    used: list[Block] = []
    for kind, value in operations:
        if kind == "alloc":
            block = allocator.malloc(value)
            assert naive.malloc(value) == (block and (block.address, block.size_bytes))
            if block is not None:
                used.append(block)
        elif kind == "empty_cache":
            allocator.empty_cache()
            naive.empty_cache()
        elif used:
            block = used.pop(value % len(used))
            naive.free(block.address)
            allocator.free(block)
        assert held(allocator) == (naive.allocated(), naive.reserved())
        assert allocator.num_alloc_retries == naive.num_retries
    assert_sound(allocator, used)
    for block in used:
        allocator.free(block)
    allocator.empty_cache()
    assert_sound(allocator, [])
    assert held(allocator) == (0, 0)


@given(OPERATIONS, st.booleans(), LIMITS, LIMITS)
def test_every_event_is_as_in_the_naive_model(
    operations: list[Operation], expandable_segments: bool, limit_bytes: int | None, card_bytes: int | None
) -> None:
    settings = AllocatorSettings(limit_bytes, expandable_segments, card_bytes=card_bytes)
    assert_as_in_the_naive_model(operations, settings)


@pytest.mark.parametrize("expandable_segments", [False, True])
@pytest.mark.parametrize(("seed", "limit_mib"), [(0, None), (1, None), (2, 300), (3, 500)])
def test_a_long_trace_is_as_in_the_naive_model(expandable_segments: bool, seed: int, limit_mib: int | None) -> None:
    limit_bytes = None if limit_mib is None else limit_mib * MIB
    settings = AllocatorSettings(limit_bytes, expandable_segments, card_bytes=limit_bytes)
    assert_as_in_the_naive_model(long_operations(seed, 1500), settings)


@given(OPERATIONS, st.booleans())
def test_a_limit_at_the_peak_changes_nothing(operations: list[Operation], expandable_segments: bool) -> None:
    trace = trace_of(operations)
    free_result = replay(trace, AllocatorSettings(expandable_segments=expandable_segments))
    assert free_result.out_of_memory is None
    for phase in free_result.phases:
        assert phase.allocated_bytes <= phase.reserved_bytes
    at_peak = AllocatorSettings(free_result.peak_reserved_bytes, expandable_segments)
    assert replay(trace, at_peak) == free_result
    assert replay(trace, at_peak) == free_result, "twice the same"
    if free_result.peak_reserved_bytes > 0:
        below = replay(trace, AllocatorSettings(free_result.peak_reserved_bytes - 1, expandable_segments))
        assert below.num_alloc_retries > 0


@given(OPERATIONS, st.booleans(), LIMITS)
def test_a_replay_is_the_allocator_event_by_event(
    operations: list[Operation], expandable_segments: bool, limit_bytes: int | None
) -> None:
    trace = trace_of(operations)
    settings = AllocatorSettings(limit_bytes, expandable_segments)
    result = replay(trace, settings)
    allocator = CachingAllocator(settings)
    used: dict[int, Block] = {}
    peaks = (0, 0)
    failed = None
    for event, (number, size_bytes) in enumerate(trace):
        if size_bytes == FREED:
            allocator.free(used.pop(number))
        elif size_bytes == CACHE_EMPTIED:
            allocator.empty_cache()
        else:
            block = allocator.malloc(size_bytes)
            if block is None:
                failed = OutOfMemory(event, size_bytes)
                break
            used[number] = block
        peaks = (max(peaks[0], allocator.allocated_bytes), max(peaks[1], allocator.device.reserved_bytes))
    assert result.out_of_memory == failed
    assert result.num_alloc_retries == allocator.num_alloc_retries
    assert result.peak_allocated_bytes == peaks[0]
    # A try that failed may have mapped pages which its retry gave back.
    assert result.peak_reserved_bytes == allocator.device.peak_reserved_bytes >= peaks[1]


@pytest.mark.parametrize("expandable_segments", [False, True])
def test_300_000_events_are_replayed_in_a_moment(expandable_segments: bool) -> None:
    trace = trace_of(long_operations(0, 320_000))
    assert len(trace) > 300_000
    started_s = time.process_time()
    replay(trace, AllocatorSettings(expandable_segments=expandable_segments))
    # The aim is 1.5 s; twice that, as the machine that runs the tests may be busy.
    assert time.process_time() - started_s < 3.0
