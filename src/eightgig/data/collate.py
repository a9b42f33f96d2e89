"""Several encoded samples as one right-padded micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eightgig.data.batch import IGNORE_INDEX, EncodedSample, MicroBatch


def collate(samples: Sequence[EncodedSample], pad_token_id: int) -> MicroBatch:
    """`samples` as one batch: texts padded on the right, image inputs laid end to end along dimension 0.

    Padding is known by position, not by token, so that a real token that happens to be the padding token (models
    that pad with their end token) keeps its label. A batch without any image has no image inputs.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        labels[row, :length] = sample.labels
    names = dict.fromkeys(name for sample in samples for name in sample.image_inputs)
    image_inputs = {
        name: torch.cat([sample.image_inputs[name] for sample in samples if name in sample.image_inputs])
        for name in names
    }
    return MicroBatch(
        model_inputs={"input_ids": input_ids, "attention_mask": attention_mask, **image_inputs},
        labels=labels,
        num_target_tokens=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        num_tokens=int(attention_mask.sum()),
        num_images=sum(sample.num_images for sample in samples),
        sample_ids=tuple(sample.sample_id for sample in samples),
    )
