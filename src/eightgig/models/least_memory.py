"""The least that QLoRA training of a model takes on a GPU, counted on the model without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageTextToText

from eightgig.core.units import MIB
from eightgig.models.quantization import is_kept_16bit
from eightgig.registry.facts import as_dicts

if TYPE_CHECKING:
    from eightgig.registry import ModelSpec

# bitsandbytes' NF4 with double quantisation: a scale of one byte a block, and an fp32 scale a block of those.
BLOCK_PARAMETERS = 64
SCALES_A_BLOCK = 256
BYTES_16BIT = 2
BYTES_FP32 = 4
# bitsandbytes' 8-bit AdamW: two states of one byte, each with an fp32 scale for a block of 256.
STATE_BYTES_A_PARAMETER = 2 * (1 + BYTES_FP32 / 256)
RANK = 8  # of the preset for 8 GB cards
# The CUDA context and libraries of a training process on an H100 with driver 580: benchmarks/results/full_size.json.
CONTEXT_BYTES = 762 * MIB


@dataclass(frozen=True)
class LeastMemory:
    """What is on the card whatever the data; activations come on top.

    Attributes:
        weights_bytes: of the frozen model: the language model's linear layers in NF4, the rest in 16 bits.
        adapters_bytes: fp32 adapters, their gradients and the states of 8-bit AdamW.
        context_bytes: of CUDA and its libraries.
    """

    weights_bytes: int
    adapters_bytes: int
    context_bytes: int = CONTEXT_BYTES

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.adapters_bytes + self.context_bytes


def least_memory(spec: ModelSpec, rank: int) -> LeastMemory:
    """What QLoRA with adapters of `rank` on every linear layer of the language model takes at least.

    The model is built on the meta device, in less than a second at any size.
    """
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(
            spec.family.build_config(spec.facts), attn_implementation=as_dicts(spec.family.attention)
        )
    model.tie_weights()
    num_adapter_parameters = sum(
        rank * (module.in_features + module.out_features)
        for path, module in model.named_modules()
        if re.fullmatch(spec.family.lora_pattern, path)
    )
    return LeastMemory(
        weights_bytes=_weights_bytes(model, spec.family.keep_16bit),
        adapters_bytes=round(num_adapter_parameters * (2 * BYTES_FP32 + STATE_BYTES_A_PARAMETER)),
    )


def _weights_bytes(model: Any, keep_16bit: tuple[str, ...]) -> int:
    counted: set[int] = set()  # tied weights are one parameter under two names
    total_bytes = 0
    for path, module in model.named_modules():
        is_4bit = isinstance(module, nn.Linear) and not is_kept_16bit(path, keep_16bit)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            quantised = is_4bit and name == "weight"
            total_bytes += _nf4_bytes(parameter.numel()) if quantised else parameter.numel() * BYTES_16BIT
    return total_bytes


def _nf4_bytes(num_parameters: int) -> int:
    num_blocks = -(-num_parameters // BLOCK_PARAMETERS)
    return -(-num_parameters // 2) + num_blocks + -(-num_blocks // SCALES_A_BLOCK) * BYTES_FP32
