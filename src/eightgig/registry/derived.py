"""The general path: a family derived from a config, a module tree and a processor, for models without one of their own.

What can't be derived with certainty is refused, with the reason; what was derived is said (`derivation`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eightgig.core.errors import UnsupportedModel
from eightgig.registry.derived_processor import ProcessorFacts, load_any_processor, processor_facts
from eightgig.registry.facts import ModelFacts, ModulePaths, transformers_config
from eightgig.registry.family import ModelFamily

MIN_LINEAR_SHARE = 0.9  # of the decoder's matrices; experts held as one tensor stay 16-bit and get no adapter
# Whether a model with such a setting in its text config applies it, depends on its own forward.
CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
BUILD_ERRORS = (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class _Tree:
    """What a module tree tells."""

    modules: ModulePaths
    lora_pattern: str
    keep_16bit: tuple[str, ...]
    keep_16bit_in_tower: tuple[str, ...]
    num_language_linears: int


class DerivedFamily(ModelFamily):
    """One model's family, made at run time."""

    name = "derived"
    models = ()
    rows_are_independent = False  # that is not known

    def __init__(self, model_type: str, location: str, tree: _Tree, processor: ProcessorFacts) -> None:
        self.model_types = (model_type,)
        self.modules = tree.modules
        self.lora_pattern = tree.lora_pattern
        self.keep_16bit = tree.keep_16bit
        self.keep_16bit_in_tower = tree.keep_16bit_in_tower
        self.image_placeholder = processor.image_placeholder
        self.end_of_turn = processor.end_of_turn
        self.image_layout = processor.image_layout
        self.derivation = _said(model_type, tree, processor)
        self._location = location
        self._num_language_linears = tree.num_language_linears
        self._takes_token_types = processor.takes_token_types

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The tower's own size where its config has one, else 0: not known."""
        size = (architecture.get("vision_config") or {}).get("image_size")
        return size if isinstance(size, int) else 0

    def tower_features(self, model: Any, output: Any) -> Any:
        """The tower's last hidden states, whichever of them the model reads."""
        return output if hasattr(output, "shape") else output[0]

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """As counted on the module tree."""
        return self._num_language_linears

    def build_processor(self, facts: ModelFacts) -> Any:
        """Raise UnsupportedModel: nobody knows what a stand-in would have to be."""
        raise UnsupportedModel(
            f"{facts.name} has no stand-in processor for random weights",
            expected="a model that the registry knows by name, or a folder with the model's own processor",
            next_step="give a folder that holds its processor files, or leave --random-weights out",
        )

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor, without video and audio parts where it has some."""
        return load_any_processor(self.model_types[0], location, **arguments)

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Accept any: `image_px_note` says that it changes nothing."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str:
        """That the setting is not applied."""
        return f"data.image_size = {image_px} changes nothing: for {facts.name} images are sized as its processor says"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """What the model's own processor writes for a blank image of that size."""
        from PIL import Image

        processor = _kept_processor(self.model_types[0], self._location)
        features = self.process_images(processor, [Image.new("RGB", (width_px, height_px))])
        (text,) = self.expand_placeholders(processor, features, 1)
        return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Change nothing."""

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Kinds of tokens, where the model takes them: 1 for an image's."""
        if not self._takes_token_types:
            return {}
        import torch

        (kinds,) = processor.create_mm_token_type_ids([input_ids.tolist()])
        return {"mm_token_type_ids": torch.tensor(kinds)}


@functools.lru_cache(maxsize=1)
def _kept_processor(model_type: str, location: str) -> Any:
    """The processor of the model that is asked about image after image."""
    return load_any_processor(model_type, location)


def derive_family(
    config: Mapping[str, Any], *, location: str, source: str, known_types: Sequence[str]
) -> DerivedFamily:
    """The family of the model at `location`, whose config.json is `config` and was read from `source`.

    Raises:
        UnsupportedModel: it is no image-text-to-text model of the installed transformers, or one whose parts can't be
            told apart; the message has the reason.
    """
    model_type = str(config.get("model_type"))
    _check_known(config, model_type, source, known_types)
    tree = _read_tree(_build(config, source), source)
    return DerivedFamily(model_type, location, tree, processor_facts(model_type, location, source))


def refused(source: str, reason: str) -> UnsupportedModel:
    """The error for a model that the general path can't handle."""
    return UnsupportedModel(
        f"{source}: {reason}",
        expected="a model whose parts EightGig can tell apart, or one that its registry knows (`eightgig models`)",
        next_step="choose another model, or write a family for it: docs/guides/adding-a-model-family.md",
    )


def _check_known(config: Mapping[str, Any], model_type: str, source: str, known_types: Sequence[str]) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    own_code = " and brings Python code of its own, which EightGig does not run" if "auto_map" in config else ""
    raise UnsupportedModel(
        f"{source} says model_type {config.get('model_type')!r}{own_code}",
        expected=f"one of: {', '.join(known_types)}; or another image-text-to-text model of transformers "
        f"{transformers.__version__}",
        next_step="choose a model of a supported family; `eightgig models` lists them",
    )


def _build(config: Mapping[str, Any], source: str) -> Any:
    """The model without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    try:
        with init_empty_weights(include_buffers=True):
            return AutoModelForImageTextToText.from_config(transformers_config(config))
    except BUILD_ERRORS as error:
        raise refused(source, f"transformers can't build it here ({type(error).__name__}: {error})") from error


def _read_tree(model: Any, source: str) -> _Tree:
    from torch import nn

    if model.config.is_encoder_decoder:
        raise refused(source, "it has an encoder and a decoder for text, and EightGig trains decoders alone")
    text_config = model.config.get_text_config()
    changed = [name for name in CHANGED_LOGITS if getattr(text_config, name, None) not in (None, 1, 1.0)]
    if changed:
        raise refused(source, f"it may cap or scale its logits ({changed[0]}): only a family of its own can know how")
    paths = {id(module): path for path, module in model.named_modules()}
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(head, nn.Linear):
        raise refused(source, "it has no linear head")
    if not hasattr(model, "model") or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise refused(source, "it has no list of decoder layers below a `model` of its own")
    lm_head, language_model = paths[id(head)], paths[id(decoder)]
    if not language_model.startswith("model."):
        raise refused(source, "its language model can't be told from the rest of it")
    names = _linear_names(decoder, source)
    towers, projectors, others = _other_parts(model, language_model, lm_head)
    if not towers:
        raise refused(source, "it has no vision tower beside its language model")
    pattern = rf"{re.escape(language_model)}\.layers\.\d+\.({'|'.join(map(re.escape, names))})"
    modules = ModulePaths(language_model=language_model, towers=towers, projectors=projectors, lm_head=lm_head)
    return _Tree(
        modules=modules,
        lora_pattern=pattern,
        keep_16bit=tuple(map(re.escape, (*towers, *projectors, *others, lm_head))),
        keep_16bit_in_tower=tuple(map(re.escape, _outside_blocks(model, towers[0]))),
        num_language_linears=sum(re.fullmatch(pattern, path) is not None for path in paths.values()),
    )


def _outside_blocks(model: Any, tower: str) -> list[str]:
    """Paths of the linear layers of `tower` that are not in a list of blocks: they embed patches, or pool.

    Also those within that their module uses otherwise than by calling them. The tower itself where no others are left.
    """
    from torch import nn

    inside: list[str] = []
    outside: list[str] = []
    for name, module in model.get_submodule(tower).named_modules():
        if isinstance(module, nn.Linear):
            is_plain = re.search(r"(^|\.)\d+\.", name) is not None and type(module) is nn.Linear
            (inside if is_plain else outside).append(f"{tower}.{name}")
    return outside if inside else [tower]


def _linear_names(decoder: Any, source: str) -> list[str]:
    """Names of the linear layers within decoder layers, e.g. `mlp.up_proj`."""
    from torch import nn

    names: dict[str, None] = {}
    num_linear, num_matrix = 0, 0
    for layer in decoder.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        names.update(dict.fromkeys(linears))
        num_linear += sum(module.weight.numel() for module in linears.values())
        num_matrix += sum(value.numel() for value in layer.parameters() if value.ndim > 1)
    if num_linear < MIN_LINEAR_SHARE * num_matrix or not names:
        share = 100 * num_linear / max(num_matrix, 1)
        raise refused(
            source, f"only {share:.0f} % of its decoder's weights are in linear layers, so 4 bits would not reach it"
        )
    return sorted(names)


def _other_parts(
    model: Any, language_model: str, lm_head: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Paths of towers (with layers of their own), of projectors, and of linear layers that belong to neither.

    Whatever stands beside the language model is one or the other.
    """
    from torch import nn

    towers: list[str] = []
    projectors: list[str] = []
    for name, child in model.model.named_children():
        path = f"model.{name}"
        if language_model == path or language_model.startswith(f"{path}.") or not any(True for _ in child.parameters()):
            continue
        has_layers = any(isinstance(module, nn.ModuleList) for module in child.modules())
        (towers if has_layers else projectors).append(path)
    known = (*towers, *projectors, lm_head, f"{language_model}.layers")
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(path == part or path.startswith(f"{part}.") for part in known)
    ]
    return tuple(towers), tuple(projectors), tuple(others)


def _said(model_type: str, tree: _Tree, processor: ProcessorFacts) -> tuple[str, ...]:
    parts = tree.modules
    sentences = [
        f"no family of the registry has model_type {model_type}: derived from its config, modules and processor",
        f"language model {parts.language_model}; kept in 16 bits: {', '.join(tree.keep_16bit)}".replace("\\", ""),
        f"adapters and 4 bits on {tree.num_language_linears} linear layers: {tree.lora_pattern}",
        f"an image is {processor.image_placeholder} in the chat template; an answer ends with {processor.end_of_turn}",
    ]
    if processor.image_layout.padding:
        sentences.append(f"filled up with zeros in a batch: {', '.join(processor.image_layout.padding)}")
    return tuple(sentences)
