"""The model of PyTorch's caching allocator, each of its rules by a case worked out by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from eightgig.plan.allocator import AllocatorSettings, CachingAllocator
from eightgig.plan.blocks import Block

MIB = 2**20


class Taken(NamedTuple):
    """A block with the address it had: once freed, it may be merged or split."""

    block: Block
    address: int


def take(allocator: CachingAllocator, size_bytes: int) -> Taken:
    block = allocator.malloc(size_bytes)
    assert block is not None
    return Taken(block, block.address)


def held(allocator: CachingAllocator) -> tuple[int, int]:
    """Allocated and reserved bytes."""
    return allocator.allocated_bytes, allocator.device.reserved_bytes


@pytest.fixture
def allocator() -> CachingAllocator:
    return CachingAllocator(AllocatorSettings())


@pytest.fixture
def expandable() -> CachingAllocator:
    return CachingAllocator(AllocatorSettings(expandable_segments=True))


# Segments that cudaMalloc gives


@pytest.mark.parametrize(
    ("requested_bytes", "rounded_bytes"), [(1, 512), (512, 512), (513, 1024), (100_000, 100_352), (MIB - 1, MIB)]
)
def test_requests_are_rounded_up_to_512_bytes(
    allocator: CachingAllocator, requested_bytes: int, rounded_bytes: int
) -> None:
    take(allocator, requested_bytes)
    assert held(allocator) == (rounded_bytes, 2 * MIB)


@pytest.mark.parametrize(
    ("requested_bytes", "segment_bytes"),
    [
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (123 * MIB + 1, 124 * MIB),
    ],
)
def test_a_segment_is_as_large_as_the_request_demands(
    allocator: CachingAllocator, requested_bytes: int, segment_bytes: int
) -> None:
    take(allocator, requested_bytes)
    assert allocator.device.reserved_bytes == segment_bytes


def test_a_small_segment_is_filled_to_its_last_512_bytes(allocator: CachingAllocator) -> None:
    for _ in range(2 * MIB // 512):
        take(allocator, 1)
    assert held(allocator) == (2 * MIB, 2 * MIB)
    take(allocator, 1)
    assert held(allocator) == (2 * MIB + 512, 4 * MIB)


def test_a_large_block_with_1_mib_to_spare_is_not_split_and_counts_whole(allocator: CachingAllocator) -> None:
    block = take(allocator, 11 * MIB)
    assert held(allocator) == (12 * MIB, 12 * MIB)
    allocator.free(block.block)
    assert held(allocator) == (0, 12 * MIB)


def test_a_large_block_with_more_to_spare_is_split(allocator: CachingAllocator) -> None:
    take(allocator, 11 * MIB - 512)
    assert held(allocator) == (11 * MIB - 512, 12 * MIB)
    take(allocator, MIB + 512)
    assert held(allocator) == (12 * MIB, 12 * MIB)


def test_the_smallest_block_that_fits_is_taken(allocator: CachingAllocator) -> None:
    large, medium, small = (take(allocator, size * MIB) for size in (40, 30, 20))
    for block in (large, medium, small):
        allocator.free(block.block)
    assert take(allocator, 22 * MIB).address == medium.address
    assert take(allocator, 40 * MIB).address == large.address
    assert allocator.device.reserved_bytes == 90 * MIB


def test_of_equal_blocks_the_earlier_segment_is_taken(allocator: CachingAllocator) -> None:
    first, second = take(allocator, 12 * MIB), take(allocator, 12 * MIB)
    allocator.free(second.block)
    allocator.free(first.block)
    assert take(allocator, 12 * MIB).address == first.address < second.address


def test_size_goes_before_address(allocator: CachingAllocator) -> None:
    first, second = take(allocator, 12 * MIB + 2 * MIB), take(allocator, 12 * MIB)
    allocator.free(first.block)
    allocator.free(second.block)
    assert take(allocator, 12 * MIB).address == second.address


def test_the_pools_do_not_share(allocator: CachingAllocator) -> None:
    allocator.free(take(allocator, 12 * MIB).block)
    small = take(allocator, MIB)
    assert allocator.device.reserved_bytes == 14 * MIB
    allocator.free(small.block)
    take(allocator, MIB + 1)
    assert allocator.device.reserved_bytes == 14 * MIB, "the cached large segment serves it"
    take(allocator, MIB + 512)
    assert allocator.device.reserved_bytes == 14 * MIB, "so does what was split off"


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_free_neighbours_become_one_block(allocator: CachingAllocator, order: tuple[int, ...]) -> None:
    blocks = [take(allocator, 4 * MIB) for _ in range(5)]
    assert held(allocator) == (20 * MIB, 20 * MIB)
    for index in order:
        allocator.free(blocks[index].block)
    assert take(allocator, 12 * MIB).address == 0
    assert held(allocator) == (20 * MIB, 20 * MIB)


def test_blocks_of_two_segments_stay_two(allocator: CachingAllocator) -> None:
    first, second = take(allocator, 20 * MIB), take(allocator, 20 * MIB)
    assert first.address + first.block.size_bytes == second.address
    allocator.free(first.block)
    allocator.free(second.block)
    take(allocator, 40 * MIB)
    assert allocator.device.reserved_bytes == 80 * MIB


def test_emptying_the_cache_keeps_segments_in_use(allocator: CachingAllocator) -> None:
    whole = take(allocator, 30 * MIB)
    part, _kept = take(allocator, 4 * MIB), take(allocator, 4 * MIB)
    small = take(allocator, 1)
    for block in (whole, part, small):
        allocator.free(block.block)
    allocator.empty_cache()
    assert held(allocator) == (4 * MIB, 20 * MIB)


def test_the_cache_is_released_before_giving_up() -> None:
    allocator = CachingAllocator(AllocatorSettings(limit_bytes=50 * MIB))
    allocator.free(take(allocator, 20 * MIB).block)
    allocator.free(take(allocator, 1).block)
    take(allocator, 28 * MIB)
    assert (allocator.num_alloc_retries, allocator.device.reserved_bytes) == (0, 50 * MIB)
    take(allocator, 21 * MIB)
    assert (allocator.num_alloc_retries, allocator.device.reserved_bytes) == (1, 50 * MIB)


def test_the_retry_can_not_release_what_is_partly_used() -> None:
    allocator = CachingAllocator(AllocatorSettings(limit_bytes=40 * MIB))
    freed = take(allocator, 9 * MIB)
    take(allocator, 9 * MIB)
    allocator.free(freed.block)
    assert allocator.malloc(22 * MIB) is None
    assert (allocator.num_alloc_retries, allocator.device.reserved_bytes) == (1, 20 * MIB)
    take(allocator, 20 * MIB)


@pytest.mark.parametrize("field", ["limit_bytes", "allowed_bytes", "card_bytes"])
def test_each_limit_binds_to_the_byte(field: str) -> None:
    assert CachingAllocator(AllocatorSettings(**{field: 12 * MIB})).malloc(12 * MIB) is not None
    assert CachingAllocator(AllocatorSettings(**{field: 12 * MIB - 1})).malloc(12 * MIB) is None


@pytest.mark.parametrize("expandable_segments", [False, True])
def test_a_request_of_an_exbibyte_is_refused_without_any_limit(expandable_segments: bool) -> None:
    assert CachingAllocator(AllocatorSettings(expandable_segments=expandable_segments)).malloc(2**60) is None


# Expandable segments


def test_an_expandable_segment_grows_by_pages(expandable: CachingAllocator) -> None:
    take(expandable, 1)
    assert held(expandable) == (512, 2 * MIB)
    take(expandable, 3 * MIB)
    assert held(expandable) == (3 * MIB + 512, 22 * MIB)


def test_a_free_tail_is_extended_by_what_is_missing(expandable: CachingAllocator) -> None:
    first = take(expandable, 3 * MIB)
    second = take(expandable, 25 * MIB)
    assert second.address == first.address + 3 * MIB
    assert held(expandable) == (28 * MIB, 40 * MIB)
    take(expandable, 12 * MIB)
    assert held(expandable) == (40 * MIB, 40 * MIB)
    take(expandable, 61 * MIB)
    assert held(expandable) == (101 * MIB, 120 * MIB)


def test_expandable_blocks_split_down_to_512_bytes(expandable: CachingAllocator) -> None:
    take(expandable, 20 * MIB - 512)
    assert held(expandable) == (20 * MIB - 512, 20 * MIB)


def test_blocks_of_different_requests_merge_in_the_one_range(expandable: CachingAllocator) -> None:
    blocks = [take(expandable, 20 * MIB) for _ in range(3)]
    for block in blocks:
        expandable.free(block.block)
    assert take(expandable, 60 * MIB).address == blocks[0].address
    assert expandable.device.reserved_bytes == 60 * MIB


def test_a_block_that_can_grow_is_spared_if_a_larger_one_can_not(expandable: CachingAllocator) -> None:
    inner = take(expandable, 30 * MIB)
    take(expandable, 5 * MIB)
    expandable.free(inner.block)
    assert take(expandable, 4 * MIB).address == inner.address, "not the 5 MiB at the mapped end"


def test_it_is_not_spared_where_the_range_ends() -> None:
    # 9/8 of 64 MiB is 72 MiB, in pages of 20 MiB a range of 80; the card has room for 3 pages.
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True, card_bytes=64 * MIB))
    first = take(expandable, 20 * MIB)
    inner = take(expandable, 30 * MIB)
    last = take(expandable, 5 * MIB)
    expandable.free(inner.block)
    # Free are 30 MiB, and 5 MiB that can grow to 25.
    assert take(expandable, 4 * MIB).address == last.address + 5 * MIB
    assert first.address == 0


def test_emptying_the_cache_unmaps_whole_pages_within_free_blocks(expandable: CachingAllocator) -> None:
    take(expandable, 10 * MIB)
    freed = take(expandable, 45 * MIB)
    take(expandable, 5 * MIB)
    expandable.free(freed.block)
    assert held(expandable) == (15 * MIB, 60 * MIB)
    expandable.empty_cache()
    # Free is 10 to 55 MiB; of the pages only 20 to 40 lies within.
    assert held(expandable) == (15 * MIB, 40 * MIB)
    assert take(expandable, 15 * MIB).address == 40 * MIB
    assert take(expandable, 10 * MIB).address == 10 * MIB
    assert held(expandable) == (40 * MIB, 40 * MIB)


def test_a_free_block_less_than_a_page_is_not_unmapped(expandable: CachingAllocator) -> None:
    take(expandable, 1)
    take(expandable, 15 * MIB)
    expandable.empty_cache()
    assert expandable.device.reserved_bytes == 22 * MIB


def test_the_lowest_hole_with_room_is_filled_first(expandable: CachingAllocator) -> None:
    blocks = [take(expandable, 20 * MIB) for _ in range(5)]
    for hole in (blocks[3], blocks[1]):
        expandable.free(hole.block)
    expandable.empty_cache()
    assert expandable.device.reserved_bytes == 60 * MIB
    assert take(expandable, 25 * MIB).address == 100 * MIB, "no hole is large enough"
    assert expandable.device.reserved_bytes == 100 * MIB
    take(expandable, 15 * MIB)
    assert take(expandable, 20 * MIB).address == blocks[1].address
    assert take(expandable, 20 * MIB).address == blocks[3].address
    assert expandable.device.reserved_bytes == 140 * MIB


def test_a_hole_is_joined_with_the_free_block_before_it(expandable: CachingAllocator) -> None:
    take(expandable, 10 * MIB)
    freed = take(expandable, 30 * MIB)
    take(expandable, 20 * MIB)
    expandable.free(freed.block)
    expandable.empty_cache()
    assert expandable.device.reserved_bytes == 40 * MIB
    assert take(expandable, 25 * MIB).address == 10 * MIB
    assert held(expandable) == (55 * MIB, 60 * MIB)


def test_a_hole_is_joined_with_the_free_block_after_it(expandable: CachingAllocator) -> None:
    freed = take(expandable, 30 * MIB)
    take(expandable, 10 * MIB)
    expandable.free(freed.block)
    expandable.empty_cache()
    assert expandable.device.reserved_bytes == 20 * MIB
    assert take(expandable, 25 * MIB).address == 0
    assert held(expandable) == (35 * MIB, 40 * MIB)


def test_the_retry_unmaps_pages() -> None:
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True, limit_bytes=60 * MIB))
    freed = take(expandable, 20 * MIB)
    take(expandable, 20 * MIB)
    expandable.free(freed.block)
    assert take(expandable, 30 * MIB).address == 40 * MIB
    assert (expandable.num_alloc_retries, expandable.device.reserved_bytes) == (1, 60 * MIB)


def test_pages_mapped_before_the_driver_refused_stay_cached() -> None:
    # The hole of 20 MiB is mapped first, then the page behind the free block is refused, on both tries.
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True, limit_bytes=60 * MIB))
    freed = take(expandable, 20 * MIB)
    behind = take(expandable, 10 * MIB)
    for _ in range(15):
        take(expandable, MIB)
    expandable.free(freed.block)
    expandable.empty_cache()
    expandable.free(behind.block)
    assert expandable.device.reserved_bytes == 36 * MIB
    assert expandable.malloc(41 * MIB) is None
    assert expandable.num_alloc_retries == 1
    # The retry gave all large pages back, then mapped none: 60 MiB in one piece are too many beside 16 MiB.
    assert expandable.device.reserved_bytes == 16 * MIB
    assert expandable.device.peak_reserved_bytes == 56 * MIB


def test_an_allowance_looks_at_what_cuda_malloc_would_be_asked_for() -> None:
    allowed = CachingAllocator(AllocatorSettings(expandable_segments=True, allowed_bytes=39 * MIB))
    take(allowed, 15 * MIB)
    assert allowed.malloc(9 * MIB) is None, "a segment for it would have 20 MiB"
    assert (allowed.num_alloc_retries, allowed.device.reserved_bytes) == (1, 20 * MIB)
    take(allowed, 10 * MIB)
    assert allowed.device.reserved_bytes == 40 * MIB, "a segment for it would have 10 MiB; the page has 20"


def test_a_range_without_room_is_followed_by_another() -> None:
    # 9/8 of 160 MiB: a range of 9 pages, 8 of which the card can back.
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True, card_bytes=160 * MIB))
    blocks = [take(expandable, 20 * MIB) for _ in range(7)]
    for hole in blocks[1::2]:
        expandable.free(hole.block)
    expandable.empty_cache()
    assert take(expandable, 35 * MIB).address == 140 * MIB
    assert take(expandable, 30 * MIB).address == 180 * MIB, "not at the free 175 MiB: the range ends at 180"
    assert expandable.device.reserved_bytes == 160 * MIB


def test_an_emptied_range_is_given_up() -> None:
    expandable = CachingAllocator(AllocatorSettings(expandable_segments=True, card_bytes=160 * MIB))
    expandable.free(take(expandable, 30 * MIB).block)
    expandable.empty_cache()
    assert held(expandable) == (0, 0)
    assert take(expandable, 30 * MIB).address == 180 * MIB
