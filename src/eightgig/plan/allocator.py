"""What PyTorch would have reserved for a trace of allocations and frees.

Source: `DeviceCachingAllocator` in c10/cuda/CUDACachingAllocator.cpp of PyTorch as of 2026 (torch 2.11 to 2.14).
`eightgig.plan.blocks` holds the rules of its pools, and says what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from eightgig.plan.blocks import (
    ALLOCATED,
    SMALL_REQUEST_BYTES,
    UNLIMITED_BYTES,
    Block,
    Device,
    ExpandablePool,
    Pool,
    round_size,
    segment_size,
)
from eightgig.plan.trace import FREED, MemoryTrace


@dataclass(frozen=True)
class AllocatorSettings:
    """How much memory there is and how segments are made. None: no limit.

    Attributes:
        limit_bytes: what the driver gives PyTorch in all: the card less its context and all else on it.
        expandable_segments: as in PYTORCH_CUDA_ALLOC_CONF.
        allowed_bytes: what torch.cuda.set_per_process_memory_fraction allows (`allowed_memory_maximum`). Without
            expandable segments it acts as `limit_bytes` does. With them PyTorch still checks the size that cudaMalloc
            would be asked for, not the pages that it then maps: it may refuse what would fit, or go beyond by a page.
        card_bytes: the card's memory, `totalGlobalMem`; an expandable segment spans 9/8 of it in addresses.
    """

    limit_bytes: int | None = None
    expandable_segments: bool = False
    allowed_bytes: int | None = None
    card_bytes: int | None = None


@dataclass(frozen=True)
class PhasePeak:
    """The peaks of one phase, as PyTorch tells them if its peaks are reset where the phase begins.

    Attributes:
        name: as marked in the trace.
        allocated_bytes: torch.cuda.max_memory_allocated.
        reserved_bytes: torch.cuda.max_memory_reserved.
    """

    name: str
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class OutOfMemory:
    """The allocation that failed even after the cache was released.

    Attributes:
        event: its index in the trace.
        requested_bytes: as requested, not rounded.
    """

    event: int
    requested_bytes: int


@dataclass(frozen=True)
class AllocatorResult:
    """What came of a replay.

    Attributes:
        phases: in the trace's order; after running out of memory, only those that were begun.
        num_alloc_retries: as in torch.cuda.memory_stats: how often the cache was released for want of memory.
        out_of_memory: where the replay ended early, None if it did not.
    """

    phases: tuple[PhasePeak, ...]
    num_alloc_retries: int
    out_of_memory: OutOfMemory | None

    @property
    def peak_allocated_bytes(self) -> int:
        """Over all phases."""
        return max(phase.allocated_bytes for phase in self.phases)

    @property
    def peak_reserved_bytes(self) -> int:
        """Over all phases."""
        return max(phase.reserved_bytes for phase in self.phases)


class CachingAllocator:
    """PyTorch's caching allocator on one device and one stream.

    Attributes:
        device: the memory taken from the driver.
        pools: the small and the large pool.
        allocated_bytes: sum of the allocated blocks; as PyTorch counts, a block that was not split counts whole.
        peak_allocated_bytes: the most of it since the last reset.
        num_alloc_retries: how often the cache was released for want of memory.
    """

    def __init__(self, settings: AllocatorSettings) -> None:
        card_bytes = _or_unlimited(settings.card_bytes)
        self.device = Device(min(_or_unlimited(settings.limit_bytes), card_bytes))
        self.pools: tuple[Pool, Pool]
        if settings.expandable_segments:
            self.pools = (
                ExpandablePool(self.device, is_small=True, card_bytes=card_bytes),
                ExpandablePool(self.device, is_small=False, card_bytes=card_bytes),
            )
        else:
            self.pools = (Pool(self.device, is_small=True), Pool(self.device, is_small=False))
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.num_alloc_retries = 0
        self._small_pool, self._large_pool = self.pools
        self._allowed_bytes = _or_unlimited(settings.allowed_bytes)

    def malloc(self, requested_bytes: int) -> Block | None:
        """`malloc` and `alloc_found_block`: a block for at least one byte; None if out of memory."""
        size_bytes = round_size(requested_bytes)
        pool = self._small_pool if size_bytes <= SMALL_REQUEST_BYTES else self._large_pool
        block = pool.take_best_fit(size_bytes) or self._reserve(pool, size_bytes) or self._retry(pool, size_bytes)
        if block is None:
            return None
        if block.size_bytes - size_bytes >= pool.min_remainder_bytes:
            remainder = block
            block = remainder.split_front(size_bytes)
            pool.insert(remainder)
        block.state = ALLOCATED
        allocated_bytes = self.allocated_bytes + block.size_bytes
        self.allocated_bytes = allocated_bytes
        if allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """`free`: keep an allocated block in the cache."""
        self.allocated_bytes -= block.size_bytes
        block.pool.cache(block)

    def empty_cache(self) -> None:
        """`release_cached_blocks`: return to the driver what is wholly free."""
        for pool in self.pools:
            pool.release()

    def reset_peaks(self) -> None:
        """`resetPeakStats`: peaks start again from what is held now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.device.peak_reserved_bytes = self.device.reserved_bytes

    def _reserve(self, pool: Pool, size_bytes: int) -> Block | None:
        if self.device.reserved_bytes + segment_size(size_bytes) > self._allowed_bytes:
            return None
        return pool.reserve(size_bytes)

    def _retry(self, pool: Pool, size_bytes: int) -> Block | None:
        self.num_alloc_retries += 1
        self.empty_cache()
        return self._reserve(pool, size_bytes)


def _or_unlimited(limit_bytes: int | None) -> int:
    return UNLIMITED_BYTES if limit_bytes is None else limit_bytes


def replay(trace: MemoryTrace, settings: AllocatorSettings) -> AllocatorResult:
    """Let PyTorch's allocator serve the events of `trace`, up to the first allocation that fails.

    300,000 events take about half a second.
    """
    allocator = CachingAllocator(settings)
    held: dict[int, Block] = {}
    phases = []
    out_of_memory = None
    for name, first, end in trace.phases():
        allocator.reset_peaks()
        out_of_memory = _replay_events(trace, first, end, allocator, held)
        phases.append(PhasePeak(name, allocator.peak_allocated_bytes, allocator.device.peak_reserved_bytes))
        if out_of_memory is not None:
            break
    return AllocatorResult(tuple(phases), allocator.num_alloc_retries, out_of_memory)


def _replay_events(
    trace: MemoryTrace, first: int, end: int, allocator: CachingAllocator, held: dict[int, Block]
) -> OutOfMemory | None:
    malloc, free = allocator.malloc, allocator.free
    events = zip(trace.blocks[first:end], trace.sizes_bytes[first:end], strict=True)
    for event, (number, size_bytes) in enumerate(events, first):
        if size_bytes > 0:
            block = malloc(size_bytes)
            if block is None:
                return OutOfMemory(event, size_bytes)
            held[number] = block
        elif size_bytes == FREED:
            free(held.pop(number))
        else:
            allocator.empty_cache()
    return None
