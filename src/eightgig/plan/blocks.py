"""The blocks, segments and pools of PyTorch's CUDA caching allocator.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of PyTorch as of 2026 (torch 2.11 to 2.14);
the docstrings name the function modelled. Only what one stream of one device does is here: no private pools, no
`record_stream`, and the options of PYTORCH_CUDA_ALLOC_CONF other than `expandable_segments` at their defaults.
`max_split_size` is then unlimited, so `release_available_cached_blocks` does nothing.

Each new segment lies above all earlier ones here. Real addresses are the driver's choice, which can only matter where
two free blocks of the same size both fit best: PyTorch took the lower address of the two, since PR #183591 of May 2026
it takes the earlier segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

from eightgig.core.units import MIB

MIN_BLOCK_BYTES: Final = 512
"""`kMinBlockSize`: every request is rounded up to a multiple of it."""

SMALL_REQUEST_BYTES: Final = MIB
"""`kSmallSize`: the largest request that the small pool serves."""

SMALL_SEGMENT_BYTES: Final = 2 * MIB
"""`kSmallBuffer`: a segment of the small pool, or a page of it if expandable."""

LARGE_SEGMENT_BYTES: Final = 20 * MIB
"""`large_segment_size`, its default: a segment for requests below OWN_SEGMENT_BYTES, or a page if expandable."""

OWN_SEGMENT_BYTES: Final = 10 * MIB
"""`kMinLargeAlloc`: requests from here on get a segment of their own."""

LARGE_ROUNDING_BYTES: Final = 2 * MIB
"""`kRoundLarge`: what a segment of their own is rounded up to."""

UNLIMITED_BYTES: Final = 2**60 - 1
"""`NativeCachingAllocator::allocate` refuses a request of 2**60 bytes and more whatever the card has."""

FREE: Final = 0
ALLOCATED: Final = 1
UNMAPPED: Final = 2

# So that a larger size is a larger key whatever the address: a segment adds at most 9/8 * 2**60 addresses.
_ADDRESS_BITS: Final = 80


def round_size(requested_bytes: int) -> int:
    """`round_size`: up to a multiple of 512 bytes, for a request of at least one byte."""
    return (requested_bytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES


def segment_size(size_bytes: int) -> int:
    """`get_allocation_size`: what is asked of the driver for a rounded request that no free block holds."""
    if size_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return _round_up(size_bytes, LARGE_ROUNDING_BYTES)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class Block:
    """A part of a segment, linked with its neighbours in it.

    Attributes:
        address: of its first byte.
        size_bytes: a multiple of 512.
        state: FREE, ALLOCATED or UNMAPPED (address range without memory behind it, of an expandable segment).
        pool: the pool whose segment it is part of.
        previous, next: the neighbours, None at the segment's ends.
    """

    __slots__ = ("address", "next", "pool", "previous", "size_bytes", "state")

    def __init__(self, pool: Pool, address: int, size_bytes: int, state: int) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.state = state
        self.previous: Block | None = None
        self.next: Block | None = None

    def split_front(self, front_bytes: int) -> Block:
        """Cut the first `front_bytes` off as a block of its own, in the same state; this block keeps the rest."""
        front = Block(self.pool, self.address, front_bytes, self.state)
        previous = self.previous
        if previous is not None:
            previous.next = front
        front.previous = previous
        front.next = self
        self.previous = front
        self.address += front_bytes
        self.size_bytes -= front_bytes
        return front


class Device:
    """The memory that the driver gives to PyTorch.

    Attributes:
        limit_bytes: the most that it gives at once.
        reserved_bytes: what it has given and not got back; torch.cuda.memory_reserved.
        peak_reserved_bytes: the most of it since `peak_reserved_bytes` was last set.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self._next_address = 0

    def take(self, size_bytes: int) -> bool:
        """Whether the driver gives `size_bytes` more; they are then reserved."""
        reserved_bytes = self.reserved_bytes + size_bytes
        if reserved_bytes > self.limit_bytes:
            return False
        self.reserved_bytes = reserved_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved_bytes)
        return True

    def give_back(self, size_bytes: int) -> None:
        """Return memory to the driver."""
        self.reserved_bytes -= size_bytes

    def new_addresses(self, size_bytes: int) -> int:
        """The first of `size_bytes` addresses that were never used, a multiple of both kinds of pages."""
        address = self._next_address
        self._next_address += _round_up(size_bytes, LARGE_SEGMENT_BYTES)
        return address


class _SortedBlocks:
    """Blocks by an integer key, in its order."""

    __slots__ = ("by_key", "keys")

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.by_key: dict[int, Block] = {}

    def add(self, key: int, block: Block) -> None:
        insort(self.keys, key)
        self.by_key[key] = block

    def remove(self, key: int) -> None:
        del self.keys[bisect_left(self.keys, key)]
        del self.by_key[key]

    def in_order(self, first_key: int = 0) -> list[Block]:
        return [self.by_key[key] for key in self.keys[bisect_left(self.keys, first_key) :]]


class Pool:
    """The small or the large blocks of one stream (`BlockPool`), in segments that cudaMalloc gave.

    A block's place in `free` follows from its size and address, so neither changes while it is in there.

    Attributes:
        device: where its segments come from.
        free: the cached blocks, by size and then address (`BlockComparatorSize`).
        min_remainder_bytes: the smallest remainder that is split off a block (`should_split`): 512 bytes in the small
            pool; in the large pool more than 1 MiB, that is 1 MiB and the next 512.
    """

    def __init__(self, device: Device, *, is_small: bool) -> None:
        self.device = device
        self.free = _SortedBlocks()
        self.min_remainder_bytes = MIN_BLOCK_BYTES if is_small else SMALL_REQUEST_BYTES + MIN_BLOCK_BYTES

    def take_best_fit(self, size_bytes: int) -> Block | None:
        """`get_free_block`: the smallest free block of at least `size_bytes`, out of the free ones; None if none is."""
        free = self.free
        index = bisect_left(free.keys, size_bytes << _ADDRESS_BITS)
        if index == len(free.keys):
            return None
        return free.by_key.pop(free.keys.pop(index))

    def insert(self, block: Block) -> None:
        """Put a block that is in state FREE among the free ones."""
        self.free.add(block.size_bytes << _ADDRESS_BITS | block.address, block)

    def remove(self, block: Block) -> None:
        """Undo `insert`."""
        self.free.remove(block.size_bytes << _ADDRESS_BITS | block.address)

    def merge(self, block: Block, neighbour: Block | None) -> None:
        """`try_merge_blocks`: let `block`, not inserted itself, take in a neighbour in the same state."""
        if neighbour is None or neighbour.state != block.state:
            return
        self.remove(neighbour)
        block.size_bytes += neighbour.size_bytes
        if neighbour is block.previous:
            block.address = neighbour.address
            block.previous = neighbour.previous
            if block.previous is not None:
                block.previous.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.previous = block

    def cache(self, block: Block) -> None:
        """`free_block`: make an allocated block free and merge it with its free neighbours."""
        block.state = FREE
        self.merge(block, block.previous)
        self.merge(block, block.next)
        self.insert(block)

    def reserve(self, size_bytes: int) -> Block | None:
        """`alloc_block`: a new segment as one FREE block, not inserted; None if the driver doesn't give it."""
        segment_bytes = segment_size(size_bytes)
        if not self.device.take(segment_bytes):
            return None
        return Block(self, self.device.new_addresses(segment_bytes), segment_bytes, FREE)

    def release(self) -> None:
        """`release_blocks`: return every segment that is wholly free to the driver."""
        for block in self.free.in_order():
            if block.previous is None and block.next is None:
                self.remove(block)
                self.device.give_back(block.size_bytes)


class ExpandablePool(Pool):
    """A pool whose segments are address ranges, mapped page by page (`ExpandableSegment`).

    Pages are 2 MiB in the small pool and 20 MiB in the large one. A range spans 9/8 of the card's memory, in whole
    pages; another one is begun only when none has room. As soon as nothing of it is mapped it is given up.

    Attributes:
        unmapped: the parts of the ranges without memory, by address.
    """

    def __init__(self, device: Device, *, is_small: bool, card_bytes: int) -> None:
        super().__init__(device, is_small=is_small)
        self.unmapped = _SortedBlocks()
        self.min_remainder_bytes = MIN_BLOCK_BYTES
        self._page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self._range_bytes = _round_up(card_bytes + card_bytes // 8, self._page_bytes)

    def insert(self, block: Block) -> None:
        """Put a block in state FREE or UNMAPPED among its like."""
        if block.state == UNMAPPED:
            self.unmapped.add(block.address, block)
        else:
            super().insert(block)

    def remove(self, block: Block) -> None:
        """Undo `insert`."""
        if block.state == UNMAPPED:
            self.unmapped.remove(block.address)
        else:
            super().remove(block)

    def take_best_fit(self, size_bytes: int) -> Block | None:
        """`get_free_block`: as in any pool, but a block counts with the unmapped part after it, into which it can grow.

        So a block at the mapped end is left alone if the next larger ones can't grow as far.
        """
        keys, by_key = self.free.keys, self.free.by_key
        index = bisect_left(keys, size_bytes << _ADDRESS_BITS)
        if index == len(keys):
            return None
        reach_bytes = _reach_bytes(by_key[keys[index]])
        while index + 1 < len(keys) and (next_bytes := _reach_bytes(by_key[keys[index + 1]])) < reach_bytes:
            index += 1
            reach_bytes = next_bytes
        return by_key.pop(keys.pop(index))

    def reserve(self, size_bytes: int) -> Block | None:
        """`try_allocate_expandable_block`: a FREE block, not inserted, after mapping what it lacks.

        None if the driver doesn't give a page; what was mapped up to then stays cached.
        """
        block: Block | None = self._find_room(size_bytes)
        if block is not None and block.state == UNMAPPED:
            block = self._map(block, min(block.size_bytes, size_bytes))
        while block is not None and block.size_bytes < size_bytes:
            following = block.next
            block = following and self._map(following, min(size_bytes - block.size_bytes, following.size_bytes))
        if block is not None:
            self.remove(block)
        return block

    def release(self) -> None:
        """`release_blocks`: unmap the whole pages in every free block; one smaller than a page has none."""
        for block in self.free.in_order(self._page_bytes << _ADDRESS_BITS):
            self._unmap(block)

    def _find_room(self, size_bytes: int) -> Block:
        """`find_expandable_block`: the first block at the lowest address where free and unmapped parts suffice.

        A new range if there is none. If that is too small as well, the driver can't give so many pages either.
        """
        for candidate in self.unmapped.in_order():
            previous = candidate.previous
            first = candidate if previous is None or previous.state == ALLOCATED else previous
            if _has_room(first, size_bytes):
                return first
        block = Block(self, self.device.new_addresses(self._range_bytes), self._range_bytes, UNMAPPED)
        self.insert(block)
        return block

    def _map(self, block: Block, size_bytes: int) -> Block | None:
        """`map_block`: put memory behind the first `size_bytes` of an unmapped block, in whole pages.

        Returns:
            The mapped part, merged with its free neighbours and inserted; None if the driver doesn't give the pages.
        """
        mapped_bytes = _round_up(size_bytes, self._page_bytes)
        if not self.device.take(mapped_bytes):
            return None
        self.remove(block)
        if mapped_bytes < block.size_bytes:
            mapped = block.split_front(mapped_bytes)
            self.insert(block)
        else:
            mapped = block
        self.cache(mapped)
        return mapped

    def _unmap(self, block: Block) -> None:
        """`unmap_block`: take the memory from the whole pages within a free block, and leave the rest of it free."""
        first = _round_up(block.address, self._page_bytes)
        end = (block.address + block.size_bytes) // self._page_bytes * self._page_bytes
        if first >= end:
            return
        self.remove(block)
        if first > block.address:
            self.insert(block.split_front(first - block.address))
        unmapped_bytes = end - first
        if unmapped_bytes < block.size_bytes:
            unmapped = block.split_front(unmapped_bytes)
            self.insert(block)
        else:
            unmapped = block
        unmapped.state = UNMAPPED
        self.merge(unmapped, unmapped.previous)
        self.merge(unmapped, unmapped.next)
        self.device.give_back(unmapped_bytes)
        if unmapped.previous is not None or unmapped.next is not None:
            self.insert(unmapped)


def _reach_bytes(block: Block) -> int:
    """`expandable_size` in `get_free_block`: the block with the unmapped part right after it."""
    following = block.next
    return block.size_bytes + (following.size_bytes if following is not None and following.state == UNMAPPED else 0)


def _has_room(block: Block | None, size_bytes: int) -> bool:
    """`has_available_address_space`: whether `size_bytes` fit from `block` on before the next allocated block."""
    room_bytes = 0
    while room_bytes < size_bytes and block is not None and block.state != ALLOCATED:
        room_bytes += block.size_bytes
        block = block.next
    return room_bytes >= size_bytes
