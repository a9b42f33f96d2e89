"""Which samples of an optimizer step go through the model together.

The step's loss is a sum over its target tokens, divided by their number: however its samples are grouped, loss and
gradients are the same up to the order of additions. So a grouping decides within a step, never across steps, and is a
function of the step's samples alone: a run that goes on groups as it would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from eightgig.config import Batching


@dataclass(frozen=True)
class Grouping:
    """How a run groups the samples of a step.

    Attributes:
        batching: the setting.
        batch_size: samples in a micro-batch; where they share a row, it holds as many tokens as the longest of them.
        sizes: of every sample of the data what orders it by length, its tokens where samples share rows; not needed
            where samples are taken in their order.
    """

    batching: Batching
    batch_size: int
    sizes: Sequence[Any] = ()

    def __call__(self, indices: Sequence[int]) -> list[list[int]]:
        """The samples of each micro-batch, from those of a step in their shuffled order."""
        if self.is_packed:
            return in_full_rows(indices, self.sizes, self.row_tokens)
        if self.batching is Batching.BY_LENGTH:
            return by_length(indices, self.sizes, self.batch_size)
        return in_order(indices, self.batch_size)

    @property
    def is_packed(self) -> bool:
        """Whether the samples of a micro-batch share one row."""
        return self.batching is Batching.PACKED

    @cached_property
    def row_tokens(self) -> int:
        """The most tokens that a shared row may have: those of the `batch_size` longest samples.

        Then those samples make a row, and none takes more of the language model than they do.
        """
        return sum(sorted(self.sizes, reverse=True)[: self.batch_size])


def in_order(indices: Sequence[int], batch_size: int) -> list[list[int]]:
    """`indices` cut into micro-batches of `batch_size`, in their order."""
    return [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]


def by_length(indices: Sequence[int], sizes: Sequence[Any], batch_size: int) -> list[list[int]]:
    """`indices` cut into micro-batches of samples that are nearly as long as each other, the longest first.

    Where all micro-batches are whole, no other cut pads less. The longest go first: what the allocator holds after them
    suffices for all that follow.
    """
    return in_order(sorted(indices, key=lambda index: sizes[index], reverse=True), batch_size)


def in_full_rows(indices: Sequence[int], num_tokens: Sequence[int], row_tokens: int) -> list[list[int]]:
    """`indices` in rows of at most `row_tokens`: first fit, the longest first; a longer sample has a row of its own.

    At most 11/9 of the fewest rows possible, and 6/9 of a row (Dosa 2007).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda index: num_tokens[index], reverse=True):
        length = num_tokens[index]
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(index)
        room[row] -= length
    return rows
