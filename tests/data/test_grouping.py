"""Which samples of a step go together: all of them, each once; with little padding or none; the same every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config import Batching
from eightgig.data.grouping import Grouping, by_length, in_full_rows, in_order
from eightgig.data.order import StepOrder

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
FEW = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def padded_tokens(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[index] for index in group) for group in groups)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put `items` into rows."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for place, row in enumerate(rest):
            yield [*rest[:place], [items[0], *row], *rest[place + 1 :]]


@given(
    lengths=LENGTHS,
    batching=st.sampled_from(Batching),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_a_step_has_the_same_samples_however_they_are_grouped(
    lengths: list[int], batching: Batching, sizes: tuple[int, int], seed: int
) -> None:
    plain = StepOrder(len(lengths), *sizes, seed)
    grouped = StepOrder(len(lengths), *sizes, seed, Grouping(batching, sizes[0], lengths))
    again = StepOrder(len(lengths), *sizes, seed, Grouping(batching, sizes[0], tuple(lengths)))
    assert grouped.steps_per_epoch == plain.steps_per_epoch
    for step in reversed(range(2 * plain.steps_per_epoch)):
        groups = grouped.micro_batches(step)
        assert sorted(itertools.chain(*groups)) == sorted(itertools.chain(*plain.micro_batches(step)))
        assert all(groups)
        assert groups == again.micro_batches(step)
        assert len(groups) <= len(plain.micro_batches(step)) or batching is Batching.PACKED


@given(lengths=LENGTHS, batch_size=st.integers(1, 5))
def test_no_row_is_longer_than_the_longest_samples_together(lengths: list[int], batch_size: int) -> None:
    grouping = Grouping(Batching.PACKED, batch_size, lengths)
    rows = grouping(range(len(lengths)))
    assert grouping.row_tokens == sum(sorted(lengths)[-batch_size:])
    assert all(sum(lengths[index] for index in row) <= grouping.row_tokens for row in rows)


@given(lengths=FEW, row_tokens=st.integers(20, 40))
def test_rows_are_nearly_as_few_as_possible(lengths: list[int], row_tokens: int) -> None:
    """Against every way to put the samples into rows; the bound is that of first fit, the longest first."""
    rows = in_full_rows(range(len(lengths)), lengths, row_tokens)
    fewest = min(
        len(ways)
        for ways in partitions(list(range(len(lengths))))
        if all(sum(lengths[index] for index in row) <= row_tokens for row in ways)
    )
    assert fewest <= len(rows) <= (11 * fewest + 6) / 9


def test_a_sample_that_no_row_holds_has_its_own() -> None:
    assert in_full_rows([0, 1, 2, 3], [3, 50, 4, 3], 10) == [[1], [2, 0, 3]]


@given(data=st.data(), batch_size=st.integers(1, 3), num_batches=st.integers(1, 2))
def test_no_other_cut_into_whole_batches_pads_less(data: st.DataObject, batch_size: int, num_batches: int) -> None:
    num_samples = batch_size * num_batches
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=num_samples, max_size=num_samples))
    ours = by_length(range(num_samples), lengths, batch_size)
    least = min(
        padded_tokens(in_order(order, batch_size), lengths) for order in itertools.permutations(range(num_samples))
    )
    assert padded_tokens(ours, lengths) == least
    longest = [max(lengths[index] for index in group) for group in ours]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("batching", [Batching.BY_LENGTH, Batching.PACKED])
@pytest.mark.parametrize("indices", [[3, 1, 0, 2], [1, 2, 3, 0]])
def test_ties_keep_the_shuffled_order(batching: Batching, indices: list[int]) -> None:
    long, short = ([index for index in indices if index in group] for group in ({1, 3}, {0, 2}))
    assert Grouping(batching, 2, [4, 9, 4, 9])(indices) == [long, short]
