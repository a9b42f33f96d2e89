"""Whether several samples can share a row of a model, and the model made ready for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from eightgig.config import Batching
from eightgig.core.errors import ConfigError, Problem
from eightgig.memory.packed_attention import attend_within_samples
from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

SETTING = "training.batching"


def check_can_pack(config: TrainingConfig, spec: ModelSpec) -> None:
    """Raise ConfigError where `config` asks for samples in one row and the model would mix them up."""
    if config.training.batching is not Batching.PACKED:
        return
    if spec.family.packing_obstacle:
        raise _refused(f"not with {spec.name}: {spec.family.packing_obstacle}")
    text = spec.family.build_config(spec.facts).get_text_config()
    windowed = set(getattr(text, "layer_types", None) or ["sliding_attention"]) - {"full_attention"}
    if getattr(text, "sliding_window", None) is not None and windowed:
        raise _refused(f"not with {spec.name}: its layers attend within a window of {text.sliding_window} tokens")


def pack_as_configured(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> None:
    """Have the language model of `model` attend within samples where `config` has them share rows.

    Raises:
        ConfigError: the model would mix them up.
    """
    check_can_pack(config, spec)
    if config.training.batching is Batching.PACKED:
        attend_within_samples(base_model(model).get_submodule(spec.family.modules.language_model))


def _refused(allowed: str) -> ConfigError:
    return ConfigError(
        [Problem(SETTING, Batching.PACKED.value, allowed)],
        source="packing",
        next_step=f"set {SETTING} to {Batching.BY_LENGTH.value}, which pads little and suits every model",
    )
