"""A run's allocations and frees in order, as a simulator writes them and an allocator reads them."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eightgig.plan.blocks import round_size
from eightgig.plan.categories import OTHER, WORKSPACES

FREED = -1
"""Stands in `MemoryTrace.sizes_bytes` where a block is freed."""

CACHE_EMPTIED = 0
"""Stands in `MemoryTrace.sizes_bytes` where `torch.cuda.empty_cache` is called (the block is then -1)."""

UNNAMED_PHASE = "start"
"""The phase of the events before the first mark."""


def _int64() -> array[int]:
    return array("q")


@dataclass(frozen=True, eq=False)
class TracePart:
    """Events to be written into a trace at once, as often as they come.

    Blocks that it allocates are numbered from 0. One from outside, which it frees, has a negative number: -1 is the
    first of those that `MemoryTrace.extend` is given.

    Attributes:
        blocks, sizes_bytes: int64, as in `MemoryTrace`.
        categories: of each block that it allocates.
        is_live: of each block that it allocates, 1 where it doesn't free it.
        empty_blocks: those of zero bytes.
    """

    blocks: npt.NDArray[np.int64]
    sizes_bytes: array[int]
    categories: Sequence[str]
    is_live: bytes
    empty_blocks: Sequence[int] = ()

    @property
    def live_blocks(self) -> list[int]:
        """Those of its blocks that it doesn't free."""
        return [block for block, is_live in enumerate(self.is_live) if is_live]


@dataclass(frozen=True, eq=False)
class MemoryTrace:
    """Allocations, frees and emptied caches of one run, divided by marks into phases.

    An event is one place in `blocks` and `sizes_bytes`: two flat arrays, as a run has hundreds of thousands.
    Blocks are numbered from 0 in the order of their allocation; a number is never used twice.

    Attributes:
        blocks: int64, the block of each event, -1 where the cache is emptied.
        sizes_bytes: int64, as requested (not rounded) where a block is allocated, else FREED or CACHE_EMPTIED.
        categories: of each block, what it is for.
        marks: (event, name): the phase `name` begins before that event. Names may come again.
    """

    blocks: array[int] = field(default_factory=_int64)
    sizes_bytes: array[int] = field(default_factory=_int64)
    marks: list[tuple[int, str]] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    _live: bytearray = field(default_factory=bytearray, repr=False)
    _empty_blocks: set[int] = field(default_factory=set, repr=False)
    _blocks_by_key: dict[str, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """How many events there are; marks and blocks of zero bytes are none."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each event as (block, size in bytes, FREED or CACHE_EMPTIED)."""
        return zip(self.blocks, self.sizes_bytes, strict=True)

    def alloc(self, size_bytes: int, category: str = OTHER) -> int:
        """Allocate a block of `size_bytes` and return its number. Zero bytes give a number but no event, as in PyTorch.

        `category` is what it is for (`plan.categories`).

        Raises:
            ValueError: `size_bytes` is negative.
        """
        if size_bytes < 0:
            raise ValueError(f"a block of {size_bytes} bytes: expected 0 or more")
        block = len(self._live)
        self._live.append(1)
        self.categories.append(category)
        if size_bytes == 0:
            self._empty_blocks.add(block)
        else:
            self.blocks.append(block)
            self.sizes_bytes.append(size_bytes)
        return block

    def alloc_once(self, key: str, size_bytes: int) -> None:
        """Allocate, where `key` is new, a block that stays: what a library keeps for itself from its first call on."""
        if key not in self._blocks_by_key:
            self._blocks_by_key[key] = self.alloc(size_bytes, WORKSPACES)

    def label(self, block: int, category: str) -> None:
        """Put `block` into `category`, over its whole life."""
        self.categories[block] = category

    def free(self, block: int) -> None:
        """Free a block.

        Raises:
            ValueError: it is freed already, or was never allocated.
        """
        if not 0 <= block < len(self._live):
            raise ValueError(f"block {block} is freed but was never allocated")
        if not self._live[block]:
            raise ValueError(f"block {block} is freed twice")
        self._live[block] = 0
        if block not in self._empty_blocks:
            self.blocks.append(block)
            self.sizes_bytes.append(FREED)

    def is_live(self, block: int) -> bool:
        """Whether there is a block of that number, and it was not freed yet."""
        return block < len(self._live) and self._live[block] == 1

    def extend(self, part: TracePart, outside: Sequence[int] = ()) -> int:
        """Write the events of `part`, and return the number that its block 0 gets; the others follow.

        `outside` are the blocks from outside that it frees.
        """
        first = len(self._live)
        numbers = part.blocks + first
        if outside:
            is_outside = part.blocks < 0
            numbers[is_outside] = np.array(outside)[-1 - part.blocks[is_outside]]
            for block in numbers[is_outside].tolist():
                self._live[block] = 0
        self.blocks.frombytes(numbers.tobytes())
        self.sizes_bytes.extend(part.sizes_bytes)
        self.categories.extend(part.categories)
        self._live.extend(part.is_live)
        self._empty_blocks.update(first + block for block in part.empty_blocks)
        return first

    @property
    def end(self) -> tuple[int, int]:
        """How many events and how many blocks there are by now."""
        return len(self.blocks), len(self._live)

    def part_since(self, end: tuple[int, int], outside: Sequence[int] = ()) -> TracePart | None:
        """What was written since `end` was the trace's, without blocks that stay (`alloc_once`).

        None where that can't be written again: it frees other blocks from outside than those given, or empties the
        cache.
        """
        first_event, first = end
        staying = np.array([block - first for block in self._blocks_by_key.values() if block >= first], dtype=np.int64)
        blocks = np.frombuffer(self.blocks[first_event:], dtype=np.int64) - first
        sizes = np.frombuffer(self.sizes_bytes[first_event:], dtype=np.int64)
        is_kept = ~np.isin(blocks, staying)
        blocks, sizes = blocks[is_kept], sizes[is_kept]
        numbers = {block - first: -1 - i for i, block in enumerate(outside)}
        is_outside = blocks < 0
        if (sizes == CACHE_EMPTIED).any() or not set(blocks[is_outside].tolist()) <= numbers.keys():
            return None
        own = np.delete(np.arange(len(self._live) - first), staying)
        renumbered = np.searchsorted(own, blocks)
        renumbered[is_outside] = [numbers[block] for block in blocks[is_outside].tolist()]
        return TracePart(
            renumbered,
            array("q", sizes.tolist()),
            [self.categories[first + block] for block in own],
            bytes(self._live[first + block] for block in own),
            [i for i, block in enumerate(own) if first + block in self._empty_blocks],
        )

    def copy(self) -> MemoryTrace:
        """A trace that goes on from here by itself."""
        return copy.deepcopy(self)

    def with_freed(self, freed: Mapping[int, Sequence[int]]) -> MemoryTrace:
        """A copy in which before each event of `freed` the blocks named there are freed, which here live to the end."""
        changed = self.copy()
        del changed.blocks[:], changed.sizes_bytes[:], changed.marks[:]
        for event in range(len(self) + 1):
            for block in freed.get(event, ()):
                changed.free(block)
            for name in (name for place, name in self.marks if place == event):
                changed.mark(name)
            changed.blocks.extend(self.blocks[event : event + 1])
            changed.sizes_bytes.extend(self.sizes_bytes[event : event + 1])
        return changed

    def empty_cache(self) -> None:
        """Record a call of `torch.cuda.empty_cache`."""
        self.blocks.append(-1)
        self.sizes_bytes.append(CACHE_EMPTIED)

    def mark(self, name: str) -> None:
        """Begin the phase `name` here."""
        self.marks.append((len(self.blocks), name))

    def phases(self) -> Iterator[tuple[str, int, int]]:
        """Each phase in order: its name, its first event, and the event after its last one.

        Events before the first mark are the phase UNNAMED_PHASE; a phase may hold no event.
        """
        marks = list(self.marks)
        if not marks or marks[0][0] > 0:
            marks.insert(0, (0, UNNAMED_PHASE))
        ends = [first for first, _ in marks[1:]] + [len(self)]
        for (first, name), end in zip(marks, ends, strict=True):
            yield name, first, end

    def categories_at_peak(self) -> dict[str, int]:
        """Bytes of each category where the most are live, blocks rounded up to 512 bytes as in `live_bytes`."""
        rounded_bytes: dict[int, int] = {}
        live_bytes = peak_bytes = peak_event = 0
        for event, (block, size_bytes) in enumerate(self):
            if size_bytes > 0:
                rounded_bytes[block] = round_size(size_bytes)
                live_bytes += rounded_bytes[block]
                if live_bytes > peak_bytes:
                    peak_bytes, peak_event = live_bytes, event
            elif size_bytes == FREED:
                live_bytes -= rounded_bytes.pop(block)
        return self._categories_after(peak_event)

    def _categories_after(self, last_event: int) -> dict[str, int]:
        live: dict[int, int] = {}
        for block, size_bytes in zip(self.blocks[: last_event + 1], self.sizes_bytes[: last_event + 1], strict=True):
            if size_bytes > 0:
                live[block] = round_size(size_bytes)
            elif size_bytes == FREED:
                del live[block]
        totals: dict[str, int] = {}
        for block, size_bytes in live.items():
            totals[self.categories[block]] = totals.get(self.categories[block], 0) + size_bytes
        return totals

    def live_bytes(self) -> list[tuple[str, int]]:
        """The most bytes that were live at once in each phase, each block rounded up to 512 bytes.

        The count at a phase's beginning belongs to it. PyTorch's `max_memory_allocated` lies above by what
        its allocator leaves in blocks that it doesn't split.
        """
        rounded_bytes: dict[int, int] = {}
        live_bytes = 0
        peaks = []
        for name, first, end in self.phases():
            peak_bytes = live_bytes
            for block, size_bytes in zip(self.blocks[first:end], self.sizes_bytes[first:end], strict=True):
                if size_bytes > 0:
                    rounded_bytes[block] = round_size(size_bytes)
                    live_bytes += rounded_bytes[block]
                    peak_bytes = max(peak_bytes, live_bytes)
                elif size_bytes == FREED:
                    live_bytes -= rounded_bytes.pop(block)
            peaks.append((name, peak_bytes))
        return peaks
