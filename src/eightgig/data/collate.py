"""Several encoded samples as one micro-batch: right-padded rows, or one row that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eightgig.data.batch import IGNORE_INDEX, EncodedSample, MicroBatch
from eightgig.registry.facts import ImageLayout

END_TO_END = ImageLayout()


def collate(samples: Sequence[EncodedSample], pad_token_id: int, layout: ImageLayout = END_TO_END) -> MicroBatch:
    """`samples` as one batch: texts padded on the right, image inputs laid end to end along dimension 0.

    Padding is known by position, not by token, so that a real token that happens to be the padding token (models
    that pad with their end token) keeps its label. A batch without any image has no image inputs.

    Args:
        samples: what belongs into the batch.
        pad_token_id: fills up `input_ids`; the token inputs are filled up with zeros.
        layout: how the family wants image inputs of different shapes, and samples without an image.
    """
    ones = [torch.ones_like(sample.input_ids) for sample in samples]
    input_ids = _stack([sample.input_ids for sample in samples], pad_token_id)
    attention_mask = _stack(ones, 0)
    labels = _stack([sample.labels for sample in samples], IGNORE_INDEX)
    token_inputs = {
        name: _stack([sample.token_inputs[name] for sample in samples], 0) for name in samples[0].token_inputs
    }
    return MicroBatch(
        model_inputs={
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **token_inputs,
            **_image_inputs(samples, layout),
        },
        labels=labels,
        num_target_tokens=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        num_tokens=int(attention_mask.sum()),
        num_images=sum(sample.num_images for sample in samples),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def pack(samples: Sequence[EncodedSample], layout: ImageLayout = END_TO_END) -> MicroBatch:
    """`samples` as one row without padding, end to end; image inputs as of `collate`, and no attention mask.

    A sample's first token is nobody's target, as in a row of its own: what stands before it is another sample.

    Args:
        samples: what belongs into the row.
        layout: as of `collate`.
    """
    labels = [sample.labels.clone() for sample in samples]
    for of_sample in labels:
        of_sample[:1] = IGNORE_INDEX
    row = torch.cat(labels).unsqueeze(0)
    token_inputs = {
        name: torch.cat([sample.token_inputs[name] for sample in samples]).unsqueeze(0)
        for name in samples[0].token_inputs
    }
    return MicroBatch(
        model_inputs={
            "input_ids": torch.cat([sample.input_ids for sample in samples]).unsqueeze(0),
            **token_inputs,
            **_image_inputs(samples, layout),
        },
        labels=row,
        num_target_tokens=int((row != IGNORE_INDEX).sum()),
        num_tokens=row.numel(),
        num_images=sum(sample.num_images for sample in samples),
        sample_ids=tuple(sample.sample_id for sample in samples),
        segment_lengths=tuple(sample.input_ids.numel() for sample in samples),
    )


def _image_inputs(samples: Sequence[EncodedSample], layout: ImageLayout) -> Mapping[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample.image_inputs):
        fill = layout.padding.get(name)
        tensors = [sample.image_inputs[name] for sample in samples if name in sample.image_inputs]
        if layout.rows_are_samples:
            empty_row = torch.full_like(tensors[0][:1], fill or 0)
            tensors = [sample.image_inputs.get(name, empty_row) for sample in samples]
        inputs[name] = torch.cat(tensors if fill is None else _equally_shaped(tensors, fill))
    return inputs


def _stack(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """[batch, ...] of `tensors`, each filled up at the end of every dimension to the largest."""
    return torch.cat(_equally_shaped([tensor.unsqueeze(0) for tensor in tensors], fill))


def _equally_shaped(tensors: Sequence[Tensor], fill: float) -> list[Tensor]:
    """`tensors`, each filled up with `fill` at the end of every dimension but the first to the largest among them."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        target = torch.full((tensor.shape[0], *shape), fill, dtype=tensor.dtype)
        target[tuple(slice(size) for size in tensor.shape)] = tensor
        filled.append(target)
    return filled
