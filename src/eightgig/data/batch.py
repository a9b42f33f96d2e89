"""The one shape in which samples reach the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class EncodedSample:
    """One sample as tensors.

    Attributes:
        input_ids: int64 [sequence].
        labels: int64 [sequence], IGNORE_INDEX where no loss is taken; same positions as `input_ids` (not shifted).
        image_inputs: what the image processor gives for all images of the sample, e.g. pixel_values [images, 3, H, W].
        sample_id: the sample's name in messages and records.
        token_inputs: more inputs with one entry a token, each [sequence, ...], e.g. mm_token_type_ids.
        num_cut_prompt_tokens: text tokens cut off the prompt to keep `max_length`.
        num_cut_answer_tokens: supervised tokens cut because the answers alone were longer than `max_length`.
    """

    input_ids: Tensor
    labels: Tensor
    image_inputs: Mapping[str, Tensor]
    sample_id: str
    num_images: int
    num_cut_prompt_tokens: int = 0
    num_cut_answer_tokens: int = 0
    token_inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: a row a sample, right-padded, or one full row that several samples share.

    Attributes:
        model_inputs: input_ids and attention_mask (int64 [batch, sequence]), the token inputs ([batch, sequence, ...])
            and the image inputs; no mask where samples share a row.
        labels: int64 [batch, sequence], not shifted; IGNORE_INDEX on prompt, image and padding.
        num_target_tokens: label positions that count in the loss, after the shift by one.
        num_tokens: real (unpadded) tokens, image tokens among them.
        num_images: images in the batch.
        sample_ids: names of the samples, in order.
        segment_lengths: tokens of each sample where they share one row; empty where each has a row of its own.
    """

    model_inputs: Mapping[str, Tensor]
    labels: Tensor
    num_target_tokens: int
    num_tokens: int
    num_images: int
    sample_ids: tuple[str, ...]
    segment_lengths: tuple[int, ...] = ()

    @property
    def num_computed_tokens(self) -> int:
        """Positions that the language model computes, padding among them."""
        return self.labels.numel()

    def to(self, device: torch.device, float_dtype: torch.dtype) -> MicroBatch:
        """The batch on `device`, floating-point inputs as `float_dtype`; copies overlap with compute where pinned."""
        return replace(
            self,
            model_inputs={
                name: tensor.to(device, dtype=float_dtype if tensor.is_floating_point() else None, non_blocking=True)
                for name, tensor in self.model_inputs.items()
            },
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> MicroBatch:
        """The batch in page-locked memory (called by torch's DataLoader)."""
        return replace(
            self,
            model_inputs={name: tensor.pin_memory() for name, tensor in self.model_inputs.items()},
            labels=self.labels.pin_memory(),
        )
