"""The allocations of one layer, to be written into a run's trace as often as the layer comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from eightgig.plan.categories import LAYER_AT_WORK, OTHER, WORKSPACES
from eightgig.plan.recorder import Ledger

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


def play(
    events: Iterable[Event],
    ledger: Ledger,
    live: dict[int, int],
    let_go: Callable[[int], None],
    category: str = LAYER_AT_WORK,
) -> None:
    """Write `events` into `ledger`; blocks that the tape knows no other category of are for `category`.

    Args:
        events: of a tape.
        ledger: where to.
        live: blocks of the tape that are allocated, and their numbers in `ledger`; brought up to date.
        category: what the layer's own blocks are for.
        let_go: is told of each freed block that is not in `live`: one from outside.
    """
    for kind, block, size_bytes, known in events:
        if kind == "once":
            ledger.alloc_once(str(block), size_bytes)
            continue
        assert isinstance(block, int)
        if kind == "alloc":
            live[block] = ledger.alloc(size_bytes, category if known == OTHER else known)
        elif block in live:
            ledger.free(live.pop(block))
        else:
            let_go(block)
