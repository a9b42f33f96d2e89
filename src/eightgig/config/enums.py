"""The words a setting may take where code branches on them."""

from __future__ import annotations

from enum import StrEnum


class _Word(StrEnum):
    """A word that may be typed in any case."""

    @classmethod
    def _missing_(cls, value: object) -> _Word | None:
        if isinstance(value, str):
            return next((member for member in cls if member.value == value.lower()), None)
        return None


class TrainingMethod(_Word):
    """How the weights are trained."""

    QLORA = "qlora"  # LoRA on frozen 4-bit weights
    LORA = "lora"  # LoRA on frozen 16-bit weights
    FULL = "full"  # every weight


class Batching(_Word):
    """Which samples of an optimizer step go through the model together."""

    IN_ORDER = "in_order"  # as they come, padded to the longest of them
    BY_LENGTH = "by_length"  # of nearly the same length, padded to the longest of them
    PACKED = "packed"  # as many as fill a row, without padding


class MixedPrecision(_Word):
    """The type that the forward and backward pass compute in."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class OptimizerName(_Word):
    """The optimizer; `auto` is 8-bit AdamW on CUDA and PyTorch's AdamW on the CPU."""

    AUTO = "auto"
    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"


class WhenDiskIsFull(_Word):
    """What a run does when there is no room for a checkpoint."""

    STOP = "stop"
    GO_ON = "go_on"
