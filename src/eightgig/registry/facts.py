"""The facts of a model as plain data, and how a config.json becomes them. No torch here at module level."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModulePaths:
    """Full paths, from the top of the transformers model, of its parts.

    Attributes:
        language_model: the module that holds the decoder layers.
        towers: encoders that stay frozen in every method (vision, also audio where there is one). A tower may hold a
            projector, as Qwen's vision model holds its merger.
        projectors: what maps a tower's features into the language model; trained where every weight is.
        lm_head: the linear layer that gives the logits.
    """

    language_model: str
    towers: tuple[str, ...]
    projectors: tuple[str, ...]
    lm_head: str


@dataclass(frozen=True)
class ImageLayout:
    """How the image inputs of several samples become those of one batch.

    Samples' tensors are laid end to end along dimension 0.

    Attributes:
        padding: inputs whose other dimensions differ from sample to sample, and the value that fills them up at the
            end of each such dimension.
        rows_are_samples: dimension 0 counts samples, not images: a sample without an image gets a row of `padding`.
    """

    padding: Mapping[str, float] = field(default_factory=dict)
    rows_are_samples: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """The facts of one published model (or of a local folder of a known family).

    Attributes:
        name: the registry's name.
        aliases: other names a user may type, lower case.
        hub_id: where the weights are published, None for a local or packaged model.
        folder: where the weights lie on this machine, None when they come from the hub.
        licence: short name of the weights' licence.
        licence_url: where it can be read; empty where that is not known.
        source: where the numbers were read.
        architecture: what `build_config` needs to rebuild the model's config without a hub.
        num_parameters: counted on the model built from `architecture`; 0 = not known beforehand (a local folder).
        num_language_linears: linear layers of the language model that carry LoRA; 0 = not known beforehand.
        image_px: side length of the image the model was trained with; where images of any size are taken, the side of
            the square with as many pixels as the published processor lets through.
        image_settings: what else of the published image processor the image-token rule needs.
    """

    name: str
    aliases: tuple[str, ...]
    hub_id: str | None
    folder: Path | None
    licence: str
    licence_url: str
    source: str
    architecture: Mapping[str, Any]
    num_parameters: int
    num_language_linears: int
    image_px: int
    image_settings: Mapping[str, Any] = field(default_factory=dict)


def as_dicts(value: Any) -> Any:
    """`value` with every mapping in it copied to a plain dict: transformers changes the ones it is given."""
    if isinstance(value, Mapping):
        return {key: as_dicts(item) for key, item in value.items()}
    return [as_dicts(item) for item in value] if isinstance(value, list | tuple) else value


def transformers_config(architecture: Mapping[str, Any]) -> Any:
    """The transformers config of `architecture`, a config.json's content; what it leaves out gets the defaults."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture["model_type"]].from_dict(as_dicts(architecture))


def read_image_settings(folder: Path | None) -> Mapping[str, Any]:
    """The image processor's settings as a model's folder has them; empty without a folder or such a file."""
    if folder is None:
        return {}
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings = settings.get(key) if key is not None else settings
            if isinstance(settings, dict):
                return settings
    return {}
