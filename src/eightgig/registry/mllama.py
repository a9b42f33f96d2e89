"""Llama 3.2 Vision: up to four tiles an image, read by cross-attention layers between a Llama's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7

# Distance of each token's id from that of <|begin_of_text|>, in Llama 3's vocabulary: 128000 there. <|image|> alone
# lies behind the vocabulary.
SPECIAL_TOKENS: Mapping[str, int] = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}
NUM_EXTRA_EMBEDDINGS = 8  # rows for <|image|> and others that the head can't write; source: transformers' model

# Renders what the published template renders without tools (source: copies of it in public repositories): a
# conversation without images begins with a system's turn that names a date, one with images may have none.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set seen = namespace(image=false) -%}"
    "{%- for message in messages -%}{%- for part in message.content if part.type == 'image' -%}"
    "{%- set seen.image = true -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if seen.image and messages[0].role == 'system' -%}"
    "{{- raise_exception('Prompting with images is incompatible with system messages.') -}}"
    "{%- endif -%}"
    "{%- if not seen.image -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' -}}"
    "{{- date_string + '\\n\\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content[0].text -}}{%- endif -%}"
    "{{- '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages if message.role != 'system' -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

LLAMA_3_2_11B_VISION = ModelFacts(
    name="llama-3.2-11b-vision",
    aliases=(
        "llama-3.2-vision",
        "llama-3.2-11b-vision-instruct",
        "meta-llama/llama-3.2-11b-vision-instruct",
    ),
    hub_id="meta-llama/Llama-3.2-11B-Vision-Instruct",
    folder=None,
    licence="Llama 3.2 Community License (not granted to people and companies in the European Union)",
    licence_url="https://www.llama.com/llama3_2/license/",
    source=(
        "defaults of transformers' MllamaConfig, which are this model's; image size and rotary scaling from memory of "
        "its config.json; parameters counted on the stock class of transformers 5.23"
    ),
    architecture={
        "model_type": "mllama",
        "image_token_index": 128256,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 1280,
            "image_size": 560,
            "intermediate_size": 5120,
            "attention_heads": 16,
            "num_hidden_layers": 32,
            "num_global_layers": 8,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "max_num_tiles": 4,
            "patch_size": 14,
            "vision_output_dim": 7680,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "hidden_size": 4096,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "vocab_size": 128256,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "pad_token_id": 128004,
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
    },
    num_parameters=10_670_220_835,
    num_language_linears=40 * NUM_LINEARS_A_LAYER,
    image_px=1120,
)


class MllamaFamily(ModelFamily):
    """One token an image in the sequence; cross-attention layers read the image's tiles from there on.

    As transformers has it, tokens before a sample's first image, and texts beside samples with images in a batch, get
    the mean of the image features there are in those layers' attention, padding among them. To a batch of texts alone
    the layers add nothing.
    """

    name = "mllama"
    model_types = ("mllama",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_model",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.((self|cross)_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    shared_inputs = (*ModelFamily.shared_inputs, ("cross_attn.k_proj", "cross_attn.v_proj"))
    keep_16bit = ("model.vision_model", "model.multi_modal_projector", "lm_head")
    image_placeholder = "<|image|>"
    end_of_turn = "<|eot_id|>"
    packing_obstacle = "each row attends to the images of one sample, in layers of their own"
    models = (LLAMA_3_2_11B_VISION,)
    # Without it the published template writes the day of training into every conversation without images.
    template_arguments: Mapping[str, Any] = {"date_string": "26 Jul 2024"}
    # Tokens ahead of a row's first image look at the slots of as many images as any row of the batch has.
    rows_are_independent = False
    layer_row_dimensions = MappingProxyType({"cross_attention_states": 0})  # each tile of each image of a row
    # An image that is only padding has all tiles valid, so that attention among them stays finite; none is looked at.
    image_layout = ImageLayout(
        padding={"pixel_values": 0.0, "aspect_ratio_ids": 0, "aspect_ratio_mask": 1}, rows_are_samples=True
    )

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the largest square of tiles."""
        vision = architecture["vision_config"]
        return int(vision["image_size"]) * math.isqrt(vision["max_num_tiles"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer, be it of self-attention or of cross-attention."""
        return int(architecture["text_config"]["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def build_processor(self, facts: ModelFacts) -> Any:
        """An `MllamaProcessor` with a byte-level tokenizer."""
        from transformers import MllamaImageProcessor, MllamaImageProcessorPil, MllamaProcessor
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        from transformers.utils import is_torchvision_available

        text, vision = facts.architecture["text_config"], facts.architecture["vision_config"]
        special_tokens = {token: text["bos_token_id"] + offset for token, offset in SPECIAL_TOKENS.items()}
        tokenizer = byte_level_tokenizer(
            {**special_tokens, self.image_placeholder: facts.architecture["image_token_index"]},
            vocab_size=text["vocab_size"] + NUM_EXTRA_EMBEDDINGS,
            roles={
                "bos_token": "<|begin_of_text|>",
                "eos_token": self.end_of_turn,
                "pad_token": "<|finetune_right_pad_id|>",
            },
        )
        image_processor = MllamaImageProcessor if is_torchvision_available() else MllamaImageProcessorPil
        return MllamaProcessor(
            image_processor(
                size={"height": vision["image_size"], "width": vision["image_size"]},
                max_image_tiles=vision["max_num_tiles"],
                image_mean=list(OPENAI_CLIP_MEAN),
                image_std=list(OPENAI_CLIP_STD),
            ),
            tokenizer,
            chat_template=CHAT_TEMPLATE,
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Accept any: `image_px_note` says that it changes nothing."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """That the tiles stay, where another size is asked for."""
        if image_px == facts.image_px:
            return None
        vision = facts.architecture["vision_config"]
        return (
            f"data.image_size = {image_px} changes nothing: {facts.name} always works on {vision['max_num_tiles']} "
            f"tiles of {vision['image_size']} px an image"
        )

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """One: the image's features are not part of the sequence."""
        return 1

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Change nothing: the model's tables of tiles have their size."""

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """Each image's token as it is."""
        return [self.image_placeholder] * num_images

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Which tiles each token may look at: `cross_attention_mask`, int64 [sequence, images, tiles].

        Nothing without images: then one image, of which no token sees any tile.
        """
        import torch
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense,
            get_cross_attention_token_mask,
        )

        max_num_tiles = processor.image_processor.max_image_tiles
        if "aspect_ratio_mask" not in image_inputs:
            return {"cross_attention_mask": torch.zeros(len(input_ids), 1, max_num_tiles, dtype=torch.int64)}
        spans = get_cross_attention_token_mask(input_ids.tolist(), processor.image_token_id)
        num_tiles = image_inputs["aspect_ratio_mask"].sum(dim=-1).tolist()
        mask = convert_sparse_cross_attention_mask_to_dense([spans], num_tiles, max_num_tiles, len(input_ids))
        return {"cross_attention_mask": torch.from_numpy(mask[0])}

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """As the model's own; in training also texts alone pass through the cross-attention layers, to no effect.

        Else a first step without an image would leave the adapters there without a gradient. With image features of
        zero and all of them masked, what such a layer adds is exactly zero.
        """
        import torch

        if "pixel_values" in inputs or not torch.is_grad_enabled():
            return super().hidden_states(model, inputs)
        backbone = base_model(model).model
        input_ids = inputs["input_ids"]
        embeddings = backbone.get_input_embeddings().weight  # may lie on the host
        no_features = torch.zeros(
            *(len(input_ids), backbone.vision_model.num_patches, embeddings.shape[1]),
            dtype=embeddings.dtype,
            device=input_ids.device,
        )
        one_masked_tile = inputs["cross_attention_mask"].new_zeros(*input_ids.shape, 1, 1)
        masked = {**inputs, "cross_attention_states": no_features, "cross_attention_mask": one_masked_tile}
        return super().hidden_states(model, masked)


FAMILIES = (MllamaFamily(),)
