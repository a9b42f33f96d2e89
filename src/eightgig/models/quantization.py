"""The 4-bit settings as transformers and bitsandbytes take them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from eightgig.config import MixedPrecision
from eightgig.core.errors import ConfigError, Problem
from eightgig.core.logging import get_logger
from eightgig.models.precision import Precision, choose_precision

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

COMPUTE_DTYPES = {
    "bfloat16": MixedPrecision.BF16,
    "float16": MixedPrecision.FP16,
    "float32": MixedPrecision.FP32,
}

TOWER_IN_4BIT = "training.quantization.vision_tower"

logger = get_logger(__name__)


def quantization_config(
    config: TrainingConfig, spec: ModelSpec, device: torch.device, precision: Precision
) -> Any | None:
    """A `BitsAndBytesConfig`, or None where the configuration asks for no 4-bit weights.

    The modules that stay 16-bit are named by their full paths: since transformers 5 a short name such as
    `vision_tower` silently matches nothing.
    """
    settings = config.training.quantization
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype_4bit(settings.bnb_4bit_compute_dtype, device, precision),
        llm_int8_skip_modules=list(modules_kept_16bit(config, spec)),
    )


def modules_kept_16bit(config: TrainingConfig, spec: ModelSpec) -> tuple[str, ...]:
    """The modules that are never quantised, as patterns of their full paths.

    Raises:
        ConfigError: the vision tower is to be quantised, and no linear layer of it can be.
    """
    wants_tower = config.training.quantization.vision_tower
    patterns = spec.family.kept_16bit(tower_in_4bit=wants_tower)
    tower = spec.family.modules.towers[0]
    if wants_tower and is_kept_16bit(tower, patterns):
        raise ConfigError(
            [Problem(TOWER_IN_4BIT, "true", f"false for {spec.name}: no linear layer of {tower} can be quantised")],
            source="model",
            next_step=f"set {TOWER_IN_4BIT} to false",
        )
    return patterns


def tower_is_4bit(config: TrainingConfig, spec: ModelSpec) -> bool:
    """Whether the vision tower's linear layers are stored in 4 bits: asked for, or always in this family."""
    is_kept = is_kept_16bit(spec.family.modules.towers[0], modules_kept_16bit(config, spec))
    return config.training.quantization.load_in_4bit and not is_kept


def compute_dtype_4bit(name: str, device: torch.device, precision: Precision) -> torch.dtype:
    """The dtype in which 4-bit layers multiply: `auto` follows the precision, others fall back as it does."""
    if name == "auto":
        return precision.compute_dtype
    chosen = choose_precision(COMPUTE_DTYPES[name], device)
    if chosen.note is not None:
        logger.warning("bnb_4bit_compute_dtype: %s", chosen.note)
    return chosen.compute_dtype


def is_kept_16bit(module_path: str, keep_16bit: tuple[str, ...]) -> bool:
    """Whether the module at `module_path` is, or lies inside, one that a pattern of `keep_16bit` matches."""
    return any(re.match(rf"(?:{pattern})(?:\.|$)", module_path) for pattern in keep_16bit)


def is_inside(module_path: str, modules: tuple[str, ...]) -> bool:
    """Whether the module at `module_path` is, or lies inside, one of `modules`."""
    return any(module_path == outer or module_path.startswith(f"{outer}.") for outer in modules)


def disable_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place during evaluation on CPUs with AVX512-BF16.

    bitsandbytes 0.50 does not unpack them for training again: after one evaluation the layers pass no gradient to
    their input, and the adapters' gradients are wrong while none of them is zero.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
