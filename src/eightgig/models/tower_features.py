"""Whether the features of a model's vision tower can be kept, and what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eightgig.config import TrainingMethod
from eightgig.core.errors import ConfigError, Problem, UnsupportedModel
from eightgig.memory.cached_tower import tower_of

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.models.load import LoadedModel
    from eightgig.registry import ModelSpec

SETTING = "hardware.cache_image_features"
LAYOUT_VERSION = 1  # of what is kept, and of how it is named
_PACKAGES = ("pillow", "torch", "transformers")  # decode images, compute, hold the tower's and the processor's code
_RANDOM = ("dropout", "drop_path")  # in the names of a config's settings


def check_features_can_be_kept(config: TrainingConfig, spec: ModelSpec) -> None:
    """Raise ConfigError where `config` asks for kept features and the family or the training method forbids them."""
    if not config.hardware.levers.cache_image_features:
        return
    paths = spec.family.modules
    if not spec.family.accepts_image_features:
        raise _refused(f"not with {spec.name}: features can't be given to the {spec.family.name} family yet")
    inside = [path for path in paths.projectors if path.startswith(f"{paths.towers[0]}.")]
    if inside and config.training.method is TrainingMethod.FULL:
        raise _refused(
            f"not with training.method = full: it trains {', '.join(inside)}, which is inside the tower of {spec.name}"
        )


def check_tower_is_fixed(model: nn.Module, spec: ModelSpec) -> None:
    """Raise unless the tower of `model` gives the same features for an image in every step.

    Raises:
        ConfigError: part of it is trained.
        UnsupportedModel: it drops values at random in training.
    """
    tower = tower_of(model, spec.family)
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if trained:
        raise _refused(
            f"not with training.lora.target_modules that match inside the vision tower: {trained[0]} and "
            f"{len(trained) - 1} other weights of it are trained"
        )
    chances = [*_dropout_layers(tower), *_dropout_settings(getattr(tower, "config", None))]
    if chances:
        raise UnsupportedModel(
            f"the vision tower of {spec.name} drops values at random in training: {chances[0]}",
            expected="a tower that gives the same features for an image each time",
            next_step=f"set {SETTING} to false",
        )


def tower_facts(
    loaded: LoadedModel,
    processor: Any,
    device: torch.device,
    input_dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """All that an image's features depend on beside the image: weights and code of tower and processor, and numerics.

    The weights' hash tells models, their quantisation, interpolated positions and random weights of another seed apart.
    """
    family = loaded.spec.family
    tower = tower_of(loaded.model, family)
    is_fp16 = torch.float16 in (input_dtype, autocast_dtype)
    return {
        "layout": LAYOUT_VERSION,
        "model": loaded.spec.name,
        "family": family.name,
        "tower": _sha256([repr(tower).encode()]),
        "settings": _setting_of_layer(loaded.model),
        "weights": weights_sha256(tower),
        "processor": _sha256([json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()]),
        "fp32": list(family.fp32_in_fp16) if is_fp16 else [],
        "device": device.type,
        "dtypes": [str(input_dtype), str(autocast_dtype)],
        "versions": {name: version(name) for name in _PACKAGES},
    }


def facts_key(facts: dict[str, Any]) -> str:
    """A name for a folder that only equal `facts` have."""
    return _sha256([json.dumps(facts, sort_keys=True).encode()])[:32]


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of all weights of `module`, by name; scales of 4-bit weights among them."""
    return _sha256(_weight_bytes(module))


def _weight_bytes(module: nn.Module) -> Iterator[bytes | memoryview]:
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _setting_of_layer(model: Any) -> str:
    """Which of the tower's layers the model reads, as its config says it."""
    config = model.get_base_model().config if hasattr(model, "get_base_model") else model.config
    return repr(getattr(config, "vision_feature_layer", None))


def _dropout_layers(tower: nn.Module) -> Iterator[str]:
    for name, module in tower.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{name} with p = {module.p:g}"


def _dropout_settings(config: Any) -> Iterator[str]:
    for name, value in vars(config).items() if config is not None else ():
        is_number = isinstance(value, int | float)
        if is_number and value > 0 and any(word in name for word in _RANDOM):
            yield f"{name} = {value:g}"


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _refused(allowed: str) -> ConfigError:
    return ConfigError(
        [Problem(SETTING, "true", allowed)],
        source="image features",
        next_step=f"set {SETTING} to false",
    )
