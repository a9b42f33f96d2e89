"""The order of samples over steps, and the split that holds some out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.conftest import make_sample

from eightgig.data.order import SplitOrder, StepOrder
from eightgig.data.sample import Sample
from eightgig.data.split import split_validation

SIZES = {"num_samples": st.integers(1, 60), "batch_size": st.integers(1, 7), "accumulation": st.integers(1, 9)}


@given(**SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_each_epoch_is_a_permutation(
    num_samples: int, batch_size: int, accumulation: int, seed: int, epoch: int
) -> None:
    order = StepOrder(num_samples, batch_size, accumulation, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.micro_batches(step) for step in steps]
    seen = [index for step in batches for batch in step for index in batch]
    assert sorted(seen) == list(range(num_samples))
    for step in batches[:-1]:
        assert [len(batch) for batch in step] == [batch_size] * accumulation
    last = [len(batch) for batch in batches[-1]]
    assert 1 <= len(last) <= accumulation
    assert all(size == batch_size for size in last[:-1])
    assert 1 <= last[-1] <= batch_size


@given(**SIZES, seed=st.integers(0, 99), steps=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_step_depends_on_nothing_but_its_number(
    num_samples: int, batch_size: int, accumulation: int, seed: int, steps: list[int]
) -> None:
    used = StepOrder(num_samples, batch_size, accumulation, seed)
    for step in steps:
        fresh = StepOrder(num_samples, batch_size, accumulation, seed)
        assert used.micro_batches(step) == fresh.micro_batches(step)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [StepOrder(100, 1, 100, seed).micro_batches(epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(first != second for index, first in enumerate(orders) for second in orders[:index])


def test_batch_size_and_accumulation_may_be_traded() -> None:
    """Batch 1 × 32 and batch 32 × 1 see the same samples in a step, in the same order."""
    one, many = StepOrder(100, 1, 32, 5), StepOrder(100, 32, 1, 5)
    for step in range(one.steps_per_epoch * 2):
        assert [batch[0] for batch in one.micro_batches(step)] == many.micro_batches(step)[0]


@pytest.mark.parametrize(("sizes", "step"), [((0, 1, 1), 0), ((1, 0, 1), 0), ((1, 1, 0), 0), ((1, 1, 1), -1)])
def test_impossible_sizes(sizes: tuple[int, int, int], step: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1|count from 0"):
        StepOrder(*sizes, 0).micro_batches(step)


@given(**SIZES, at_once=st.integers(1, 9), step=st.integers(0, 40))
def test_smaller_passes_have_the_same_samples_in_the_same_order(
    num_samples: int, batch_size: int, accumulation: int, at_once: int, step: int
) -> None:
    order = StepOrder(num_samples, batch_size, accumulation, seed=1)
    split, whole = SplitOrder(order, at_once).micro_batches(step), order.micro_batches(step)
    assert [index for batch in split for index in batch] == [index for batch in whole for index in batch]
    assert max(map(len, split)) <= at_once
    assert len(split) == sum(-(-len(batch) // at_once) for batch in whole)  # no pass mixes micro-batches


def test_passes_hold_a_sample_at_least() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SplitOrder(StepOrder(3, 1, 1, 0), 0)


def samples(num_images: int, per_image: int) -> list[Sample]:
    return [
        make_sample(("user", [Path(f"{image}.png"), str(turn)]), ("assistant", "a"), sample_id=f"{image}-{turn}")
        for image in range(num_images)
        for turn in range(per_image)
    ]


@given(num=st.integers(2, 80), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_the_held_out_share(num: int, fraction: float, seed: int) -> None:
    whole = samples(num, 1)
    training, validation = split_validation(whole, fraction, seed)
    assert sorted([*training, *validation], key=whole.index) == whole
    assert list(training) == [sample for sample in whole if sample in training]
    assert list(validation) == [sample for sample in whole if sample in validation]
    assert len(validation) == min(max(1, -(-num * fraction // 1)), num - 1)
    assert split_validation(whole, fraction, seed) == (training, validation)


def test_no_image_is_on_both_sides() -> None:
    training, validation = split_validation(samples(20, 5), 0.1, 3)
    assert len(validation) == 10
    assert not {sample.images[0] for sample in training} & {sample.images[0] for sample in validation}


def test_samples_of_one_image_are_split_all_the_same() -> None:
    training, validation = split_validation(samples(1, 10), 0.2, 3)
    assert (len(training), len(validation)) == (8, 2)


def test_other_seeds_hold_out_others() -> None:
    held_out = {split_validation(samples(50, 1), 0.1, seed)[1] for seed in range(5)}
    assert len(held_out) == 5


def test_nothing_is_held_out_of_one_sample_or_by_no_fraction() -> None:
    assert split_validation(samples(1, 1), 0.5, 0) == (tuple(samples(1, 1)), ())
    assert split_validation(samples(3, 1), 0.0, 0) == (tuple(samples(3, 1)), ())
