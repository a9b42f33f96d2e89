"""The allocator's rules once more, without any structure to keep up to date: slow, but there is little to get wrong.

All it remembers is which pages are mapped and which addresses are used. What is free follows from that anew for each
event: the longest stretches of mapped addresses that nothing uses.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

MIB = 2**20


@dataclass(eq=False)
class Segment:
    base: int
    size: int
    page: int
    is_small: bool
    mapped: set[int] = field(default_factory=set)


class NaiveAllocator:
    def __init__(self, *, expandable: bool, limit: int | None = None, card: int | None = None) -> None:
        self.expandable = expandable
        self.card = 2**60 - 1 if card is None else card
        self.limit = min(self.card, 2**60 - 1 if limit is None else limit)
        self.segments: list[Segment] = []
        self.used: dict[int, int] = {}
        self.next_base = 0
        self.num_retries = 0

    def allocated(self) -> int:
        return sum(self.used.values())

    def reserved(self) -> int:
        return sum(len(segment.mapped) * segment.page for segment in self.segments)

    def malloc(self, requested: int) -> tuple[int, int] | None:
        """Address and size of the new block."""
        size = (requested + 511) // 512 * 512
        is_small = size <= MIB
        found = self.best_fit(size, is_small) or self.new_memory(size, is_small)
        if found is None:
            self.num_retries += 1
            self.empty_cache()
            found = self.new_memory(size, is_small)
        if found is None:
            return None
        address, free_size = found
        splits = free_size - size >= 512 if is_small or self.expandable else free_size - size > MIB
        self.used[address] = size if splits else free_size
        return address, self.used[address]

    def free(self, address: int) -> None:
        del self.used[address]

    def empty_cache(self) -> None:
        for segment in list(self.segments):
            had_pages = bool(segment.mapped)
            for page in list(segment.mapped):
                first = segment.base + page * segment.page
                if not any(a < first + segment.page and first < a + size for a, size in self.used.items()):
                    segment.mapped.remove(page)
            if had_pages and not segment.mapped:
                self.segments.remove(segment)

    def stretches(self, segment: Segment) -> list[tuple[int, int, str]]:
        """(address, size, used, free or unmapped) from end to end; neighbours differ unless both are used."""
        inside = [a for a in self.used if segment.base <= a < segment.base + segment.size]
        cuts = {segment.base, segment.base + segment.size}
        for page in segment.mapped:
            cuts |= {segment.base + page * segment.page, segment.base + (page + 1) * segment.page}
        for address in inside:
            end = address + self.used[address]
            cuts = {cut for cut in cuts if not address < cut < end} | {address, end}
        result: list[tuple[int, int, str]] = []
        ordered = sorted(cuts)
        for first, end in itertools.pairwise(ordered):
            is_mapped = (first - segment.base) // segment.page in segment.mapped
            kind = "used" if first in self.used else "free" if is_mapped else "unmapped"
            if result and kind != "used" and result[-1][2] == kind:
                result[-1] = (result[-1][0], end - result[-1][0], kind)
            else:
                result.append((first, end - first, kind))
        return result

    def of_pool(self, is_small: bool) -> list[list[tuple[int, int, str]]]:
        return [self.stretches(segment) for segment in self.segments if segment.is_small == is_small]

    def best_fit(self, size: int, is_small: bool) -> tuple[int, int] | None:
        candidates = []
        for stretches in self.of_pool(is_small):
            for (address, length, kind), following in zip(stretches, [*stretches[1:], None], strict=True):
                if kind == "free" and length >= size:
                    grows_by = following[1] if following is not None and following[2] == "unmapped" else 0
                    candidates.append((length, address, length + grows_by))
        candidates.sort()
        chosen = 0
        while self.expandable and chosen + 1 < len(candidates) and candidates[chosen + 1][2] < candidates[chosen][2]:
            chosen += 1
        return (candidates[chosen][1], candidates[chosen][0]) if candidates else None

    def new_memory(self, size: int, is_small: bool) -> tuple[int, int] | None:
        if self.expandable:
            return self.grow(size, is_small)
        length = 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved() + length > self.limit:
            return None
        segment = self.new_segment(length, length, is_small)
        segment.mapped.add(0)
        return segment.base, length

    def new_segment(self, length: int, page: int, is_small: bool) -> Segment:
        segment = Segment(self.next_base, length, page, is_small)
        self.next_base += -(-length // (20 * MIB)) * 20 * MIB
        self.segments.append(segment)
        return segment

    def grow(self, size: int, is_small: bool) -> tuple[int, int] | None:
        place = self.lowest_room(size, is_small)
        if place is None:
            page = 2 * MIB if is_small else 20 * MIB
            length = -(-(self.card + self.card // 8) // page) * page
            if length < size:
                return None
            place = self.new_segment(length, page, is_small).base
        (segment,) = [s for s in self.segments if s.base <= place < s.base + s.size]
        for address, length, kind in self.stretches(segment):
            if kind == "unmapped" and place <= address < place + size:
                needed = min(length, place + size - address)
                first = (address - segment.base) // segment.page
                pages = range(first, first + -(-needed // segment.page))
                if self.reserved() + len(pages) * segment.page > self.limit:
                    return None
                segment.mapped.update(pages)
        (length,) = [length for address, length, _ in self.stretches(segment) if address == place]
        return place, length

    def lowest_room(self, size: int, is_small: bool) -> int | None:
        for stretches in self.of_pool(is_small):
            for index, (_, _, kind) in enumerate(stretches):
                if kind != "unmapped":
                    continue
                first = index - 1 if index > 0 and stretches[index - 1][2] == "free" else index
                room = 0
                for _, length, following in stretches[first:]:
                    if following == "used":
                        break
                    room += length
                if room >= size:
                    return stretches[first][0]
        return None
