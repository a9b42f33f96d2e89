"""What tests of model, memory and export share: the tiny LLaVA loaded for a run, and a batch for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eightgig import registry
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision

CPU = torch.device("cpu")


def tiny_config(sections: Mapping[str, Mapping[str, Any]] | None = None, *, precision: str = "fp32") -> TrainingConfig:
    """Rank-8 QLoRA on the CPU in `precision`; `sections` overrides, e.g. `{"data": {"image_size": 16}}`."""
    values: dict[str, Any] = {
        "training": {"lora": {"rank": 8, "alpha": 16}},
        "hardware": {"device": "cpu", "mixed_precision": precision},
    }
    for name, section in (sections or {}).items():
        values[name] = {**values.get(name, {}), **section}
    return TrainingConfig.model_validate(values)


def load_tiny(folder: Path, config: TrainingConfig, *, adapters: bool = False) -> LoadedModel:
    """The model in `folder`, loaded as `config` says."""
    spec = registry.resolve(str(folder))
    loaded = load_model(config, spec, CPU, choose_precision(MixedPrecision(config.hardware.mixed_precision), CPU))
    if adapters:
        attach_adapters(loaded, config)
    return loaded


def tiny_inputs(loaded: LoadedModel, *, num_images: int = 1, seed: int = 0, image_px: int = 32) -> dict[str, Tensor]:
    """Model inputs: one row an image, `num_images` × (image tokens + text), pixels of the model's compute dtype."""
    generator = torch.Generator().manual_seed(seed)
    processor = loaded.processor
    num_tokens = loaded.spec.family.num_image_tokens(loaded.spec.facts, image_px, width_px=1, height_px=1)
    text = "USER: " + processor.image_token * num_tokens + "\nHow many? ASSISTANT: seven bars</s>"
    input_ids = torch.tensor([processor.tokenizer(text)["input_ids"]] * num_images)
    pixels = torch.randn(num_images, 3, image_px, image_px, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels.to(loaded.precision.compute_dtype),
    }


def text_loss(loaded: LoadedModel, inputs: Mapping[str, Tensor], *, num_targets: int = 5) -> Tensor:
    """Mean cross-entropy of the last `num_targets` tokens of each row."""
    family = loaded.spec.family
    hidden = family.hidden_states(loaded.model, inputs)[:, -num_targets - 1 : -1]
    logits = family.logits(loaded.model, hidden).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, -num_targets:].flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients there are, by name."""
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that learn."""
    return (value for value in model.parameters() if value.requires_grad)
