"""Padding, masks and counts of a batch, against a batch put together by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eightgig.data.batch import IGNORE_INDEX, EncodedSample
from eightgig.data.collate import collate, pack
from eightgig.registry import ImageLayout

PAD = 0


def encoded(ids: list[int], supervised: list[bool], num_images: int = 0, sample_id: str = "s") -> EncodedSample:
    labels = [token if mark else IGNORE_INDEX for token, mark in zip(ids, supervised, strict=True)]
    pixels = torch.full((num_images, 3, 2, 2), float(ids[0]))
    return EncodedSample(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        image_inputs={"pixel_values": pixels} if num_images else {},
        sample_id=sample_id,
        num_images=num_images,
    )


def test_a_batch_by_hand() -> None:
    first = encoded([5, 6, 7], [False, True, True], num_images=2, sample_id="a")
    second = encoded([8, 9, 0, 4, 0], [False, False, False, True, True], sample_id="b")  # 0 is a real token here
    third = encoded([3, 2], [False, True], num_images=1, sample_id="c")
    batch = collate([first, second, third], PAD)
    assert batch.model_inputs["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 0, 4, 0], [3, 2, 0, 0, 0]]
    assert batch.model_inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    ignore = IGNORE_INDEX
    assert batch.labels.tolist() == [
        [ignore, 6, 7, ignore, ignore],
        [ignore, ignore, ignore, 4, 0],
        [ignore, 2, ignore, ignore, ignore],
    ]
    assert batch.model_inputs["pixel_values"][:, 0, 0, 0].tolist() == [5.0, 5.0, 3.0]
    assert (batch.num_target_tokens, batch.num_tokens, batch.num_images) == (5, 10, 3)
    assert batch.sample_ids == ("a", "b", "c")


def test_a_shared_row_by_hand() -> None:
    """The second sample's first token is an answer's, and yet no target: a row of its own has none there either."""
    first = encoded([5, 6, 7], [False, True, True], num_images=2, sample_id="a")
    second = encoded([8, 9], [True, True], sample_id="b")
    third = encoded([3, 2], [False, True], num_images=1, sample_id="c")
    labels = second.labels.clone()
    row = pack([first, second, third])
    ignore = IGNORE_INDEX
    assert row.model_inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 2]]
    assert row.labels.tolist() == [[ignore, 6, 7, ignore, 9, ignore, 2]]
    assert torch.equal(second.labels, labels)
    assert row.model_inputs["pixel_values"][:, 0, 0, 0].tolist() == [5.0, 5.0, 3.0]
    assert set(row.model_inputs) == {"input_ids", "pixel_values"}
    assert (row.num_target_tokens, row.num_tokens, row.num_computed_tokens, row.num_images) == (4, 7, 7, 3)
    assert (row.sample_ids, row.segment_lengths) == (("a", "b", "c"), (3, 2, 2))
    assert collate([first, second, third], PAD).num_computed_tokens == 9


def test_token_inputs_of_a_shared_row_stand_end_to_end() -> None:
    samples = [encoded([5, 6, 7], [False, True, True]), encoded([8, 9], [False, True])]
    marks = [torch.arange(len(sample.input_ids) * 4).reshape(-1, 2, 2) for sample in samples]
    row = pack([dataclasses.replace(s, token_inputs={"marks": m}) for s, m in zip(samples, marks, strict=True)])
    assert torch.equal(row.model_inputs["marks"][0], torch.cat(marks))
    assert row.model_inputs["marks"].shape == (1, 5, 2, 2)


def test_text_alone_has_no_image_inputs() -> None:
    batch = collate([encoded([5, 6], [False, True])], PAD)
    assert set(batch.model_inputs) == {"input_ids", "attention_mask"}


def test_the_first_token_is_no_target() -> None:
    """Nothing stands before it that it could be predicted from."""
    assert collate([encoded([5, 6], [True, True])], PAD).num_target_tokens == 1


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=5
    )
)
def test_any_batch_keeps_every_row(rows: list[list[tuple[int, bool]]]) -> None:
    samples = [encoded([token for token, _ in row], [mark for _, mark in row]) for row in rows]
    batch = collate(samples, PAD)
    for row, sample in enumerate(samples):
        length = int(batch.model_inputs["attention_mask"][row].sum())
        assert length == len(sample.input_ids)
        assert torch.equal(batch.model_inputs["input_ids"][row, :length], sample.input_ids)
        assert torch.equal(batch.labels[row, :length], sample.labels)
        assert (batch.labels[row, length:] == IGNORE_INDEX).all()
        assert (batch.model_inputs["input_ids"][row, length:] == PAD).all()
    assert batch.num_target_tokens == sum(mark for row in rows for _, mark in row[1:])
    assert batch.num_tokens == sum(map(len, rows))


def _with_pixels(sample: EncodedSample, *shape: int) -> EncodedSample:
    return dataclasses.replace(sample, image_inputs={"pixel_values": torch.ones(shape)}, num_images=shape[0])


def test_token_inputs_are_filled_up_with_zeros_in_every_dimension() -> None:
    short = dataclasses.replace(encoded([5], [False]), token_inputs={"kinds": torch.tensor([1]), "m": torch.ones(1, 2)})
    long = dataclasses.replace(
        encoded([6, 7], [False, True]), token_inputs={"kinds": torch.tensor([1, 2]), "m": torch.ones(2, 1)}
    )
    batch = collate([short, long], PAD)
    assert batch.model_inputs["kinds"].tolist() == [[1, 0], [1, 2]]
    assert batch.model_inputs["m"].tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]


def test_images_of_different_tilings_need_a_layout_that_says_so() -> None:
    few, many = (_with_pixels(encoded([5, 6], [False, True]), 1, num_tiles, 2) for num_tiles in (1, 3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        collate([few, many], PAD)
    pixels = collate([few, many], PAD, ImageLayout(padding={"pixel_values": -1.0})).model_inputs["pixel_values"]
    assert pixels.tolist() == [[[1, 1], [-1, -1], [-1, -1]], [[1, 1], [1, 1], [1, 1]]]


def test_where_rows_are_samples_one_without_an_image_gets_a_row() -> None:
    layout = ImageLayout(padding={"pixel_values": 0.0}, rows_are_samples=True)
    text, image = encoded([5, 6], [False, True]), _with_pixels(encoded([7, 8], [False, True]), 1, 2)
    assert collate([text, image], PAD, layout).model_inputs["pixel_values"].tolist() == [[0, 0], [1, 1]]
    assert "pixel_values" not in collate([text, text], PAD, layout).model_inputs
