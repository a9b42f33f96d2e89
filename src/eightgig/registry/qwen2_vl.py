"""Qwen2-VL and Qwen2.5-VL: images of any size at 28 px a token, multimodal rotary positions, a Qwen2 language model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.qwen_vision import (
    APACHE_2_LICENCE,
    DEFAULT_SYSTEM,
    NUM_LINEARS_A_LAYER,
    QwenVisionFamily,
    chatml_template,
)

# OpenAI CLIP's statistics. Source: preprocessor_config.json of Qwen/Qwen2-VL-7B-Instruct.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TOKEN_IDS: Mapping[str, int] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _text(shape: tuple[int, int, int, int, int], *, vocab: int, max_positions: int) -> Mapping[str, Any]:
    """A Qwen2 text model of `shape`: hidden size, layers, query heads, key-value heads, intermediate size."""
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size = shape
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


def _qwen2_vl(text: Mapping[str, Any], *, tied: bool) -> Mapping[str, Any]:
    vision = {
        "model_type": "qwen2_vl_vision",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": text["hidden_size"],
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return {
        "model_type": "qwen2_vl",
        "text_config": {"model_type": "qwen2_vl_text", **text},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **TOKEN_IDS,
    }


def _qwen2_5_vl(text: Mapping[str, Any], *, tied: bool) -> Mapping[str, Any]:
    vision = {
        "model_type": "qwen2_5_vl_vision",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {"model_type": "qwen2_5_vl_text", **text},
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **TOKEN_IDS,
    }


def _facts(name: str, hub_name: str, architecture: Mapping[str, Any], num_parameters: int, licence: str) -> ModelFacts:
    hub_id = f"Qwen/{hub_name}"
    return ModelFacts(
        name=name,
        aliases=(hub_name.lower(), hub_id.lower()),
        hub_id=hub_id,
        folder=None,
        licence=licence,
        licence_url=APACHE_2_LICENCE
        if licence == "Apache-2.0"
        else f"https://huggingface.co/{hub_id}/blob/main/LICENSE",
        source=f"config.json of {hub_id}; parameters counted on the stock class of transformers 5.23",
        architecture=architecture,
        num_parameters=num_parameters,
        num_language_linears=architecture["text_config"]["num_hidden_layers"] * NUM_LINEARS_A_LAYER,
        image_px=3584,
    )


class Qwen2VLFamily(QwenVisionFamily):
    """Qwen2-VL: full attention in the tower."""

    name = "qwen2-vl"
    model_types = ("qwen2_vl",)
    processor_class = "Qwen2VLProcessor"
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.visual",),
        projectors=("model.visual.merger",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    layer_row_dimensions = MappingProxyType({"position_embeddings": -3})  # older transformers: [3, rows, tokens, head]
    image_mean = CLIP_MEAN
    image_std = CLIP_STD
    default_min_pixels = 56**2
    default_max_pixels = 3584**2
    standin_template = chatml_template(system=DEFAULT_SYSTEM)
    dtype_caution = (
        "Scores of attention leave the range of fp16 where they are not accumulated in fp32 (transformers #33294): "
        "SDPA does that, eager attention gives NaN."
    )
    models = (
        _facts(
            "qwen2-vl-2b",
            "Qwen2-VL-2B-Instruct",
            _qwen2_vl(_text((1536, 28, 12, 2, 8960), vocab=151936, max_positions=32768), tied=True),
            2_208_985_600,
            "Apache-2.0",
        ),
        _facts(
            "qwen2-vl-7b",
            "Qwen2-VL-7B-Instruct",
            _qwen2_vl(_text((3584, 28, 28, 4, 18944), vocab=152064, max_positions=32768), tied=False),
            8_291_375_616,
            "Apache-2.0",
        ),
    )


class Qwen25VLFamily(Qwen2VLFamily):
    """Qwen2.5-VL: window attention in the tower; else as Qwen2-VL."""

    name = "qwen2.5-vl"
    model_types = ("qwen2_5_vl",)
    processor_class = "Qwen2_5_VLProcessor"
    models = (
        _facts(
            "qwen2.5-vl-3b",
            "Qwen2.5-VL-3B-Instruct",
            _qwen2_5_vl(_text((2048, 36, 16, 2, 11008), vocab=151936, max_positions=128000), tied=True),
            3_754_622_976,
            "Qwen Research License",
        ),
        _facts(
            "qwen2.5-vl-7b",
            "Qwen2.5-VL-7B-Instruct",
            _qwen2_5_vl(_text((3584, 28, 28, 4, 18944), vocab=152064, max_positions=128000), tied=False),
            8_292_166_656,
            "Apache-2.0",
        ),
    )


FAMILIES = (Qwen2VLFamily(), Qwen25VLFamily())
