"""What EightGig knows about a model family: facts as data, behaviour as hooks. No torch here at module level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModulePaths:
    """Full paths, from the top of the transformers model, of its parts."""

    language_model: str
    vision_tower: str
    projector: str
    lm_head: str


@dataclass(frozen=True)
class ModelFacts:
    """The facts of one published model (or of a local folder of a known family).

    Attributes:
        name: the registry's name.
        aliases: other names a user may type, lower case.
        hub_id: where the weights are published, None for a local or packaged model.
        folder: where the weights lie on this machine, None when they come from the hub.
        licence: short name of the weights' licence.
        source: where the numbers were read.
        architecture: what `build_config` needs to rebuild the model's config without a hub.
        num_parameters: counted on the model built from `architecture`; 0 = not known beforehand (a local folder).
        num_language_linears: linear layers of the language model that carry LoRA; 0 = not known beforehand.
        image_px: side length of the image the model was trained with.
    """

    name: str
    aliases: tuple[str, ...]
    hub_id: str | None
    folder: Path | None
    licence: str
    source: str
    architecture: Mapping[str, Any]
    num_parameters: int
    num_language_linears: int
    image_px: int


def base_model(model: Any) -> Any:
    """The transformers model inside a PeftModel, or `model` itself: where the paths in `ModulePaths` start."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ModelFamily(ABC):
    """One family: all that differs from one VLM architecture to the next. Everything else treats models alike.

    `torch` and `transformers` are imported inside the hooks that need them.
    """

    name: str
    model_types: tuple[str, ...]  # values of `model_type` in config.json that belong to the family
    modules: ModulePaths
    lora_pattern: str  # regular expression, matched in full against module paths: the language model's linears
    keep_16bit: tuple[str, ...]  # full module paths never quantised; the lm_head is always among them
    image_placeholder: str  # what the chat template writes for one image
    end_of_turn: str  # the token that ends an answer
    models: tuple[ModelFacts, ...]

    @abstractmethod
    def facts_from_config(
        self, config: Mapping[str, Any], *, name: str, folder: Path | None, hub_id: str | None
    ) -> ModelFacts:
        """Facts of a model that is not in the table, read off its config.json."""

    @abstractmethod
    def build_config(self, facts: ModelFacts) -> Any:
        """The transformers config, rebuilt from the facts alone."""

    @abstractmethod
    def build_processor(self, facts: ModelFacts) -> Any:
        """A stand-in processor for random weights: right sizes, token ids and template, a byte-level vocabulary."""

    @abstractmethod
    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError where the family can't take images of `image_px`."""

    @abstractmethod
    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Tokens of an image of `width_px` × `height_px` in the sequence, at the `image_size` setting `image_px`."""

    @abstractmethod
    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Make the model (if given) and its processor take images of `image_px`; None keeps the model's own size."""

    @abstractmethod
    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """For each image of one sample, the text that its placeholder becomes: one image token a feature."""

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Last hidden states, [batch, sequence, hidden], of the whole multimodal backbone, without the head."""
        return base_model(model).model(**inputs, use_cache=False).last_hidden_state

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits, [..., vocab], of `hidden` states [..., hidden]; families that cap or scale theirs override this."""
        return base_model(model).get_submodule(self.modules.lm_head)(hidden)

    def decoder_layers(self, model: Any) -> Sequence[Any]:
        """The language model's decoder layers, first to last: the unit of activation checkpointing."""
        return list(base_model(model).get_submodule(self.modules.language_model).layers)


@dataclass(frozen=True)
class ModelSpec:
    """A model the rest of EightGig can work with: its family (behaviour) and its facts."""

    family: ModelFamily
    facts: ModelFacts

    @property
    def name(self) -> str:
        """The model's name as shown to the user."""
        return self.facts.name

    @property
    def location(self) -> str:
        """What `from_pretrained` is given: the folder, else the hub id."""
        return str(self.facts.folder) if self.facts.folder is not None else str(self.facts.hub_id)
