"""LLaVA-1.5 and other stock `LlavaForConditionalGeneration` models: a CLIP tower, a two-layer projector, a Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.standin import byte_level_tokenizer

# CLIP ViT-L/14 at 336 px. Source: config.json of llava-hf/llava-1.5-7b-hf.
CLIP_L_336: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}

LLAMA_2_LICENCE = "https://ai.meta.com/llama/license/"

# Text models whose layers hold q, k, v, o, gate, up and down, under the names of `LlavaFamily.lora_pattern`.
SEVEN_LINEARS_A_LAYER = ("llama", "mistral", "qwen2")
NUM_LINEARS_A_LAYER = 7

# Renders what the published LLaVA-1.5 template renders: role in capitals, images first, each text followed by a space.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role != 'system' -%}{{- message.role.upper() + ': ' -}}{%- endif -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- part.text + ' ' -}}{%- endgeneration -%}"
    "{%- else -%}{{- part.text + ' ' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


def _vicuna(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32064,
    }


def _architecture(text_config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": CLIP_L_336,
        "text_config": text_config,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


LLAVA_1_5_7B = ModelFacts(
    name="llava-1.5-7b",
    aliases=("llava-7b", "llava-v1.5-7b", "llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    hub_id="llava-hf/llava-1.5-7b-hf",
    folder=None,
    licence="Llama 2 Community License",
    licence_url=LLAMA_2_LICENCE,
    source="config.json of llava-hf/llava-1.5-7b-hf; parameters counted on the stock class of transformers 5.23",
    architecture=_architecture(_vicuna(4096, 32, 32, 11008)),
    num_parameters=7_063_427_072,
    num_language_linears=32 * NUM_LINEARS_A_LAYER,
    image_px=336,
)

LLAVA_1_5_13B = ModelFacts(
    name="llava-1.5-13b",
    aliases=("llava-13b", "llava-v1.5-13b", "llava-1.5-13b-hf", "llava-hf/llava-1.5-13b-hf"),
    hub_id="llava-hf/llava-1.5-13b-hf",
    folder=None,
    licence="Llama 2 Community License",
    licence_url=LLAMA_2_LICENCE,
    source="config.json of llava-hf/llava-1.5-13b-hf; parameters counted on the stock class of transformers 5.23",
    architecture=_architecture(_vicuna(5120, 40, 40, 13824)),
    num_parameters=13_351_494_656,
    num_language_linears=40 * NUM_LINEARS_A_LAYER,
    image_px=336,
)


class LlavaFamily(ModelFamily):
    """Fixed square images on a patch grid; one image token a patch, the class token dropped."""

    name = "llava"
    model_types = ("llava",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_placeholder = "<image>"
    end_of_turn = "</s>"
    packing_obstacle = ""
    models = (LLAVA_1_5_7B, LLAVA_1_5_13B)
    interpolates_positions = True
    accepts_image_features = True

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the tower's own grid."""
        return int(architecture["vision_config"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """Seven a layer for the text models known to have them."""
        text = architecture["text_config"]
        return text["num_hidden_layers"] * NUM_LINEARS_A_LAYER if text["model_type"] in SEVEN_LINEARS_A_LAYER else 0

    def build_processor(self, facts: ModelFacts) -> Any:
        """A `LlavaProcessor` with CLIP's image processing and a byte-level tokenizer."""
        from transformers import CLIPImageProcessor, CLIPImageProcessorPil, LlavaProcessor
        from transformers.utils import is_torchvision_available

        image_id = facts.architecture["image_token_index"]
        special_tokens = {
            "<unk>": 0,
            "<s>": 1,
            self.end_of_turn: 2,
            self.image_placeholder: image_id,
            "<pad>": facts.architecture.get("pad_token_id") or image_id + 1,
        }
        tokenizer = byte_level_tokenizer(
            special_tokens,
            vocab_size=facts.architecture["text_config"]["vocab_size"],
            roles={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": self.end_of_turn, "pad_token": "<pad>"},
        )
        px = facts.image_px
        image_processor = CLIPImageProcessor if is_torchvision_available() else CLIPImageProcessorPil
        return LlavaProcessor(
            image_processor(size={"shortest_edge": px}, crop_size={"height": px, "width": px}),
            tokenizer,
            patch_size=_patch_px(facts),
            vision_feature_select_strategy=_strategy(facts),
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
            image_token=self.image_placeholder,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Raise ConfigError unless the image divides into whole patches."""
        patch_px = _patch_px(facts)
        if image_px >= patch_px and image_px % patch_px == 0:
            return
        lower = max(image_px // patch_px, 1) * patch_px
        raise ConfigError(
            [Problem("data.image_size", str(image_px), f"a multiple of the patch size, {patch_px} px")],
            source=f"{facts.name} with its fixed grid of patches",
            next_step=f"use {lower} or {lower + patch_px}, or leave it out for the model's own {facts.image_px} px",
        )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """One token a patch of the square that every image is resized to; its own size does not matter."""
        num_patches_a_side = (image_px or facts.image_px) // _patch_px(facts)
        return num_patches_a_side**2 + (0 if _strategy(facts) == "default" else 1)

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Set the processor's size, and resize the tower's position table once, as CLIP itself would on each forward.

        The table then equals what `vision_tower(pixels, interpolate_pos_encoding=True)` computes, bit for bit, so an
        adapter trained at another size also runs in plain transformers with that argument given to the tower; a model
        saved whole has the new size in its config and needs nothing.
        """
        if image_px is None:
            return
        if model is not None:
            _resize_positions(base_model(model), self.modules.towers[0], image_px)
        image_processor = processor.image_processor
        if "shortest_edge" in dict(image_processor.size):
            image_processor.size = {"shortest_edge": image_px}
        else:
            image_processor.size = {"height": image_px, "width": image_px}
        image_processor.crop_size = {"height": image_px, "width": image_px}

    def tower_features(self, model: Any, output: Any) -> Any:
        """The hidden states of the layers that the projector gets, side by side: [images, 1 + patches, width]."""
        import torch

        return torch.cat([output.hidden_states[layer] for layer in _feature_layers(model)], dim=-1)

    def tower_output(self, model: Any, features: Any) -> Any:
        """Hidden states under the numbers of the layers that the model looks up, and no others."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        layers = _feature_layers(model)
        states = dict(zip(layers, features.chunk(len(layers), dim=-1), strict=True))
        return BaseModelOutputWithPooling(hidden_states=states)

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """`num_images` times the image tokens of one processed image; pixel_values is [images, 3, height, width]."""
        height_px, width_px = image_inputs["pixel_values"].shape[-2:]
        num_tokens = (height_px // processor.patch_size) * (width_px // processor.patch_size)
        num_tokens += processor.num_additional_image_tokens
        if processor.vision_feature_select_strategy == "default":
            num_tokens -= 1
        return [processor.image_token * num_tokens] * num_images


def _feature_layers(model: Any) -> list[int]:
    layers = base_model(model).config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


def _patch_px(facts: ModelFacts) -> int:
    return int(facts.architecture["vision_config"]["patch_size"])


def _strategy(facts: ModelFacts) -> str:
    return str(facts.architecture["vision_feature_select_strategy"])


def _resize_positions(model: Any, tower_path: str, image_px: int) -> None:
    import torch
    from torch import nn
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    tower = model.get_submodule(tower_path)
    embeddings = next((module for module in tower.modules() if isinstance(module, CLIPVisionEmbeddings)), None)
    if embeddings is None:
        raise ConfigError(
            [Problem("data.image_size", str(image_px), "only a CLIP tower's positions can be interpolated")],
            source=f"a model whose vision tower is {type(tower).__name__}",
            next_step="leave data.image_size out",
        )
    if image_px == embeddings.image_size:
        return
    num_patches = (image_px // embeddings.patch_size) ** 2
    old = embeddings.position_embedding.weight
    with torch.no_grad():
        shape_only = torch.empty(1, num_patches + 1, old.shape[1], device="meta")
        table = embeddings.interpolate_pos_encoding(shape_only, image_px, image_px)[0].contiguous()
    resized = nn.Embedding(num_patches + 1, old.shape[1], _weight=table)
    embeddings.position_embedding = resized.requires_grad_(old.requires_grad)
    embeddings.image_size = image_px
    embeddings.num_patches, embeddings.num_positions = num_patches, num_patches + 1
    embeddings.register_buffer(
        "position_ids", torch.arange(num_patches + 1, device=old.device).expand((1, -1)), persistent=False
    )
    for config in (embeddings.config, model.config.vision_config):
        config.image_size = image_px
    model.config.image_seq_length = num_patches


FAMILIES = (LlavaFamily(),)
