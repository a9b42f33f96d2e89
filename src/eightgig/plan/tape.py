"""The allocations of one layer, to be written into a run's trace as often as the layer comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from eightgig.plan.categories import LAYER_AT_WORK, OTHER, WORKSPACES
from eightgig.plan.trace import MemoryTrace, TracePart

Event = tuple[Literal["alloc", "free", "once"], int | str, int, str]
"""What happens, the block (of `once`: its key), its bytes (of `free`: 0) and, where it is allocated, its category."""


@dataclass
class Tape:
    """A ledger whose events can be played into another one.

    Blocks are numbered from 0; those from outside of the layer (its inputs, gradients that come in) have numbers but
    no allocation here.
    """

    events: list[Event] = field(default_factory=list)
    _live: set[int] = field(default_factory=set)
    _num_blocks: int = 0

    def alloc(self, size_bytes: int, category: str = OTHER) -> int:
        """Allocate a block for what `category` says and return its number."""
        block = self.external()
        self.events.append(("alloc", block, size_bytes, category))
        return block

    def label(self, block: int, category: str) -> None:
        """Nothing: whoever plays the tape knows what the layer's own blocks are for."""

    def alloc_once(self, key: str, size_bytes: int) -> None:
        """Allocate, where `key` is new to the ledger that this is played into, a block that stays."""
        self.events.append(("once", key, size_bytes, WORKSPACES))

    def free(self, block: int) -> None:
        """Free a block, also one from outside: then its last reference is gone."""
        self._live.remove(block)
        self.events.append(("free", block, 0, OTHER))

    def external(self) -> int:
        """The number of a block that was allocated elsewhere."""
        block = self._num_blocks
        self._num_blocks += 1
        self._live.add(block)
        return block

    def is_live(self, block: int) -> bool:
        """Whether `block` was not freed yet."""
        return block in self._live


@dataclass(frozen=True)
class Stretch:
    """Allocations that come one after the other, and frees of the same blocks: they can be written at once.

    Attributes:
        part: the events.
        survivors: blocks of the tape that it does not free, and their numbers in `part`.
    """

    part: TracePart
    survivors: Mapping[int, int]

    @functools.cached_property
    def _by_category(self) -> dict[str, TracePart]:
        return {}

    def of_category(self, category: str) -> TracePart:
        """The events; blocks that the tape knows no other category of are for `category`."""
        if category not in self._by_category:
            known = [category if each == OTHER else each for each in self.part.categories]
            self._by_category[category] = replace(self.part, categories=known)
        return self._by_category[category]


def stretches(events: Iterable[Event]) -> list[Stretch | Event]:
    """`events` in as few pieces as can be: frees of other blocks, and what stays from its first time on, are apart."""
    pieces: list[Stretch | Event] = []
    tape, keys = MemoryTrace(), set()
    numbers: dict[int, int] = {}

    def end_stretch() -> None:
        nonlocal tape, numbers
        part = tape.part_since((0, 0))
        assert part is not None  # it frees nothing but its own
        survivors = {block: number for block, number in numbers.items() if tape.is_live(number)}
        if part.categories:
            pieces.append(Stretch(part, survivors))
        tape, numbers = MemoryTrace(), {}

    for event in events:
        kind, block, size_bytes, category = event
        if kind == "alloc":
            assert isinstance(block, int)
            numbers[block] = tape.alloc(size_bytes, category)
        elif block in numbers:
            assert isinstance(block, int)
            tape.free(numbers[block])
        elif kind == "free" or block not in keys:
            end_stretch()
            pieces.append(event)
            if kind == "once":
                keys.add(block)
    end_stretch()
    return pieces


def play(
    pieces: Iterable[Stretch | Event],
    trace: MemoryTrace,
    live: dict[int, int],
    let_go: Callable[[int], None],
    category: str = LAYER_AT_WORK,
) -> None:
    """Write `pieces` into `trace`; blocks that the tape knows no other category of are for `category`.

    Args:
        pieces: the `stretches` of a tape's events.
        trace: where to.
        live: blocks of the tape that are allocated, and their numbers in `trace`; brought up to date.
        category: what the layer's own blocks are for.
        let_go: is told of each freed block that is not in `live`: one from outside.
    """
    for piece in pieces:
        if isinstance(piece, Stretch):
            first = trace.extend(piece.of_category(category))
            live.update((block, first + number) for block, number in piece.survivors.items())
            continue
        kind, block, size_bytes, _ = piece
        if kind == "once":
            trace.alloc_once(str(block), size_bytes)
        else:
            assert isinstance(block, int)
            if block in live:
                trace.free(live.pop(block))
            else:
                let_go(block)
