"""What EightGig knows about a model family: facts as data, behaviour as hooks. No torch here at module level."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths, read_image_settings, transformers_config

# What a folder must hold for `load_processor`, one file of each kind; transformers would else look at the hub for it.
PROCESSOR_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image processor settings": ("processor_config.json", "preprocessor_config.json"),
        "tokenizer": ("tokenizer.json", "tokenizer.model"),
    }
)

SEE_THE_MODEL = "see the model's own page or folder"


def base_model(model: Any) -> Any:
    """The transformers model inside a PeftModel, or `model` itself: where the paths in `ModulePaths` start."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ModelFamily(ABC):
    """One family: all that differs from one VLM architecture to the next. Everything else treats models alike.

    `torch` and `transformers` are imported inside the hooks that need them. Hooks are called in data workers too, so a
    family must survive pickling.

    Attributes:
        name: short name of the family.
        model_types: values of `model_type` in config.json that belong to it.
        modules: where its parts lie.
        lora_pattern: regular expression, matched in full against module paths: the language model's linear layers.
        keep_16bit: modules that are never quantised, each with all inside it: regular expressions, matched from the
            start of full paths as transformers matches `llm_int8_skip_modules`; the lm_head is always among them.
        keep_16bit_in_tower: modules inside the first tower that stay 16-bit where that tower is in 4 bits: linear
            layers that embed patches. Norms, convolutions, tables of positions and projectors need not be named.
        image_placeholder: what the chat template writes for one image.
        end_of_turn: the token that ends an answer.
        models: the published models known by name.
        chat_template: the template to use where the processor has none; None for families that publish theirs.
        template_arguments: variables that the chat template is given, e.g. to switch thinking off.
        reserved_texts: further texts that no user's text may spell, beside the tokenizer's special tokens.
        image_layout: how samples' image inputs become a batch.
        shared_inputs: linear layers that are called with the same tensor, in the order of their calls: paths within a
            decoder layer; a layer may lack some.
        fp32_in_fp16: patterns of the full paths of modules whose activations leave the range of fp16: in fp16 mode they
            run in fp32. Products with 4-bit weights do so only in 4-bit layers that match themselves.
        dtype_caution: what a user should know about dtypes, one sentence; empty where there is nothing.
        interpolates_positions: whether another image size changes the tower's position table, so that whoever reloads
            an adapter must have the positions interpolated.
        attention: transformers' `attn_implementation`; by name of the config's part where one of them has no SDPA.
        accepts_image_features: whether a frozen tower's features can be kept and given in place of pixels: each image
            is processed by itself, `pixel_values` reach the tower as they are, and `tower_features` tells what the
            model reads of the tower's output.
        layer_row_dimensions: by name, arguments of a decoder layer that don't have one entry a row along their first
            dimension: the dimension that their rows lie along, each of one or more entries; None: the same for all.
        rows_are_independent: whether a sample's loss does not depend on the others in its batch.
        has_own_classes: whether its model is EightGig's own implementation, not one of transformers.
        processor_files: what a folder must hold for `load_processor`: kinds of files, one name of each will do.
        packing_obstacle: why several samples can't share a row (`training.batching` = packed); empty where they can,
            and loss and gradients are those of samples in rows of their own (tests/registry/test_families.py).
        derivation: where the family was derived from a config and a module tree: what was derived, a sentence each.
    """

    name: str
    model_types: tuple[str, ...]
    modules: ModulePaths
    lora_pattern: str
    keep_16bit: tuple[str, ...]
    image_placeholder: str
    end_of_turn: str
    models: tuple[ModelFacts, ...]
    keep_16bit_in_tower: tuple[str, ...] = ()
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = MappingProxyType({})
    reserved_texts: tuple[str, ...] = ()
    image_layout: ImageLayout = ImageLayout()
    shared_inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    fp32_in_fp16: tuple[str, ...] = ()
    dtype_caution: str = ""
    interpolates_positions: bool = False
    attention: str | Mapping[str, str] = "sdpa"
    accepts_image_features: bool = False
    rows_are_independent: bool = True
    layer_row_dimensions: Mapping[str, int | None] = MappingProxyType({})
    has_own_classes: bool = False
    processor_files: Mapping[str, tuple[str, ...]] = PROCESSOR_FILES
    packing_obstacle: str = "nobody has shown yet that samples in one row stay apart in it"
    derivation: tuple[str, ...] = ()

    # Facts

    @abstractmethod
    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """`ModelFacts.image_px` of a model with this config, whose folder has these image settings (maybe none)."""

    @abstractmethod
    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """`ModelFacts.num_language_linears` of a model with this config; 0 where it can't be told."""

    def facts_from_config(
        self, config: Mapping[str, Any], *, name: str, folder: Path | None, hub_id: str | None
    ) -> ModelFacts:
        """Facts of a model that is not in the table, read off its config.json; what that leaves out is default."""
        filled = transformers_config(config).to_dict()
        settings = read_image_settings(folder)
        return ModelFacts(
            name=name,
            aliases=(),
            hub_id=hub_id,
            folder=folder,
            licence=SEE_THE_MODEL,
            licence_url="",
            source=str(folder / "config.json") if folder is not None else f"config.json of {hub_id}",
            architecture=filled,
            num_parameters=0,
            num_language_linears=self.count_language_linears(filled),
            image_px=self.native_image_px(filled, settings),
            image_settings=settings,
        )

    def build_config(self, facts: ModelFacts) -> Any:
        """The transformers config, rebuilt from the facts alone."""
        return transformers_config(facts.architecture)

    def kept_16bit(self, *, tower_in_4bit: bool) -> tuple[str, ...]:
        """The modules that are never quantised, as `keep_16bit` names them; without the first tower's if it is."""
        if not tower_in_4bit:
            return self.keep_16bit
        tower = self.modules.towers[0]
        others = [pattern for pattern in self.keep_16bit if re.fullmatch(pattern, tower) is None]
        inside = [re.escape(path) for path in self.modules.projectors if path.startswith(f"{tower}.")]
        return (*others, *inside, *self.keep_16bit_in_tower)

    # Processor and images

    @abstractmethod
    def build_processor(self, facts: ModelFacts) -> Any:
        """A stand-in processor for random weights: right sizes, token ids and template, a byte-level vocabulary."""

    def load_processor(self, location: str, **arguments: Any) -> Any:
        """The published processor of `location` (folder or hub id); `arguments` go to `from_pretrained`."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(location, **arguments)

    @abstractmethod
    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError where the family can't take `image_px` as its `data.image_size`."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """What the user should know about `data.image_size = image_px` here, where it does not mean what it says."""
        return None

    @abstractmethod
    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """Tokens of an image of `width_px` × `height_px` in the sequence, at the `image_size` setting `image_px`.

        All tokens that take the placeholder's place count, such as marks of rows and tiles.
        """

    @abstractmethod
    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Make the model (if given) and its processor take images of `image_px`; None keeps the model's own size."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> Mapping[str, Any]:
        """The image processor's output for all PIL images of one sample; tensors in it become model inputs."""
        features: Mapping[str, Any] = processor.image_processor(images=list(images), return_tensors="pt")
        return features

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """For each image of one sample, the text that its placeholder becomes: one image token a feature.

        By default what transformers' own processor would write.
        """
        return [processor.replace_image_token(image_inputs, index) for index in range(num_images)]

    def prompt_inputs(self, processor: Any, question: str, num_images: int) -> Mapping[str, Any]:
        """More image inputs, made from the words before the first answer; for a sample with images."""
        return {}

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """More model inputs, one value a token: name -> [sequence, ...]; batches are filled up with zeros.

        Args:
            processor: the model's processor.
            input_ids: int64 [sequence] of one sample, as the model will get it.
            is_answer: bool [sequence], whether the loss counts the token; all False in a prompt.
            image_inputs: the sample's image inputs, empty without images.
        """
        return {}

    # Model

    def load_model(self, location: str, **arguments: Any) -> tuple[Any, Mapping[str, Any]]:
        """The model at `location` and transformers' loading info (`missing_keys`); `arguments` are `from_pretrained`'s.

        A family with classes of its own registers them with transformers' Auto classes here and in `build_config`.
        """
        from transformers import AutoModelForImageTextToText

        loaded: tuple[Any, Mapping[str, Any]] = AutoModelForImageTextToText.from_pretrained(
            location, output_loading_info=True, **arguments
        )
        return loaded

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Last hidden states, [batch, sequence, hidden], of the whole multimodal backbone, without the head."""
        return base_model(model).model(**inputs, use_cache=False).last_hidden_state

    def packed_inputs(self, model: Any, inputs: Mapping[str, Any], segment_lengths: Sequence[int]) -> Mapping[str, Any]:
        """`inputs` of a row that samples of so many tokens share, on the host, with the positions of its tokens.

        They are what each sample has in a row of its own. Attention is told by other means (`memory.packed_attention`).
        """
        import torch

        positions = torch.cat([torch.arange(length) for length in segment_lengths])
        return {**inputs, "position_ids": positions.unsqueeze(0)}

    def own_inputs(self, model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """`inputs` as the model's own forward takes them, where it wants an image even for texts without one."""
        return inputs

    def tower_features(self, model: Any, output: Any) -> Any:
        """All that `model` reads of its first tower's `output`, as one tensor [rows, ..., width], images end to end.

        As many rows an image as it has rows of pixel values, or the same share of them for all images.
        """
        return output.last_hidden_state

    def tower_output(self, model: Any, features: Any) -> Any:
        """An output of the tower in which `model` finds `features`: what `tower_features` undoes."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=features)

    def logits(self, model: Any, hidden: Any) -> Any:
        """Logits, [..., vocab], of `hidden` states [..., hidden]; families that cap or scale theirs override this."""
        return base_model(model).get_submodule(self.modules.lm_head)(hidden)

    def decoder_layers(self, model: Any) -> Sequence[Any]:
        """The language model's decoder layers, first to last: the unit of activation checkpointing."""
        return list(base_model(model).get_submodule(self.modules.language_model).layers)

    def mlp(self, layer: Any) -> Any | None:
        """The MLP of a decoder layer: it maps [..., tokens, hidden] to the same shape, each token by itself.

        None where the layer has none that takes hidden states alone: then it can't be computed in tiles.
        """
        return getattr(layer, "mlp", None)

    def projections(self, layer: Any) -> Sequence[Any]:
        """What maps each token by itself in a decoder layer, beside its MLP: its own norms, and linear layers.

        A linear layer with an adapter stands for both. Norms within attention, which take heads, are left out.
        """
        from torch import nn

        of_mlp = self.mlp(layer)
        found = [child for child in layer.children() if type(child).__name__.endswith(("RMSNorm", "LayerNorm"))]
        inside = set() if of_mlp is None else set(of_mlp.modules())
        for module in layer.modules():
            if module not in inside and (isinstance(module, nn.Linear) or hasattr(module, "base_layer")):
                found.append(module)
                inside |= set(module.modules())
        return found

    def linears_of_one_input(self, layer: Any) -> Sequence[Sequence[Any]]:
        """The modules of a decoder layer that `shared_inputs` names: those that it has."""
        modules = dict(layer.named_modules())
        return [[modules[path] for path in paths if modules.get(path) is not None] for paths in self.shared_inputs]

    def host_tables(self, model: Any) -> Sequence[Any]:
        """The tables of embeddings that `hardware.embedding_on_host` keeps on the host; only looked up by ids."""
        return [base_model(model).get_input_embeddings()]

    def generate(self, model: Any, inputs: Mapping[str, Any], **arguments: Any) -> Any:
        """Ids that `model` writes after the prompts in `inputs`, int64 [batch, new tokens]."""
        return model.generate(**inputs, **arguments)[:, inputs["input_ids"].shape[1] :]


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
