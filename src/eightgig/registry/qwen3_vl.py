"""Qwen3-VL: images of any size at 32 px a token, tower features also added in the first decoder layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import base_model
from eightgig.registry.qwen_vision import APACHE_2_LICENCE, NUM_LINEARS_A_LAYER, QwenVisionFamily, chatml_template

# Source: preprocessor_config.json of Qwen/Qwen3-VL-4B-Instruct.
HALF = (0.5, 0.5, 0.5)
MIN_PIXELS = 256**2
MAX_PIXELS = 4096**2

TOWER_SMALL: Mapping[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}
TOWER_LARGE: Mapping[str, Any] = {**TOWER_SMALL, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304}


def _facts(
    size: str, shape: tuple[int, int, int, int], tower: Mapping[str, Any], *, tied: bool, num_parameters: int
) -> ModelFacts:
    """A published model; `shape`: hidden size, layers, query heads, intermediate size (8 key-value heads of 128)."""
    hub_name = f"Qwen3-VL-{size}-Instruct"
    hub_id = f"Qwen/{hub_name}"
    hidden_size, num_layers, num_heads, intermediate_size = shape
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    return ModelFacts(
        name=f"qwen3-vl-{size.lower()}",
        aliases=(hub_name.lower(), hub_id.lower()),
        hub_id=hub_id,
        folder=None,
        licence="Apache-2.0",
        licence_url=APACHE_2_LICENCE,
        source=f"config.json of {hub_id}; parameters counted on the stock class of transformers 5.23",
        architecture={
            "model_type": "qwen3_vl",
            "text_config": text,
            "vision_config": {"model_type": "qwen3_vl_vision", "out_hidden_size": hidden_size, **tower},
            "tie_word_embeddings": tied,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        },
        num_parameters=num_parameters,
        num_language_linears=num_layers * NUM_LINEARS_A_LAYER,
        image_px=4096,
    )


DEEPSTACK_SMALL = {**TOWER_SMALL, "deepstack_visual_indexes": [5, 11, 17]}
DEEPSTACK_LARGE = {**TOWER_LARGE, "deepstack_visual_indexes": [8, 16, 24]}


class Qwen3VLFamily(QwenVisionFamily):
    """One merger at the tower's end and one for each layer whose features go into DeepStack."""

    name = "qwen3-vl"
    model_types = ("qwen3_vl",)
    processor_class = "Qwen3VLProcessor"
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.visual",),
        projectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    image_mean = HALF
    image_std = HALF
    default_min_pixels = MIN_PIXELS
    default_max_pixels = MAX_PIXELS
    standin_template = chatml_template()
    models = (
        _facts("2B", (2048, 28, 16, 6144), DEEPSTACK_SMALL, tied=True, num_parameters=2_127_532_032),
        _facts("4B", (2560, 36, 32, 9728), DEEPSTACK_SMALL, tied=True, num_parameters=4_437_815_808),
        _facts("8B", (4096, 36, 32, 12288), DEEPSTACK_LARGE, tied=False, num_parameters=8_767_123_696),
    )

    def tower_features(self, model: Any, output: Any) -> Any:
        """The merged patches and those for DeepStack's layers, side by side: [tokens, (1 + layers) × hidden]."""
        import torch

        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def tower_output(self, model: Any, features: Any) -> Any:
        """An output with the merged patches and those for DeepStack's layers."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        num_layers = len(base_model(model).config.vision_config.deepstack_visual_indexes)
        merged, *deepstack = features.chunk(1 + num_layers, dim=-1)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=merged, deepstack_features=deepstack)


FAMILIES = (Qwen3VLFamily(),)
