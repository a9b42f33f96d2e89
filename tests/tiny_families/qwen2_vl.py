"""Qwen2-VL and Qwen2.5-VL, tiny: 8 px a token, at least 256 pixels an image, at most 64 × 64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eightgig.registry.qwen2_vl import Qwen2VLFamily, Qwen25VLFamily
from tiny_family import TinyFamily, tiny_facts

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    "bos_token_id": 291,
    "eos_token_id": 293,
}
VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKEN_IDS = {
    "image_token_id": 303,
    "video_token_id": 304,
    "vision_start_token_id": 300,
    "vision_end_token_id": 301,
}
IMAGE_SETTINGS = {"size": {"shortest_edge": 256, "longest_edge": 4096}}


def image(num_tokens: int) -> str:
    """What an image becomes."""
    return f"<|vision_start|>{'<|image_pad|>' * num_tokens}<|vision_end|>"


def architecture(model_type: str, vision: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json of a tiny model with tied embeddings."""
    return {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", **TEXT},
        "vision_config": {"model_type": f"{model_type}_vision", **VISION, **vision},
        "tie_word_embeddings": True,
        **TOKEN_IDS,
    }


# 53 × 37 is rounded to 56 × 40 (35 tokens), 29 × 61 to 32 × 64 (32 tokens).
CONVERSATION = (
    ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False),
    (f"<|im_start|>user\n{image(35)}{image(32)}What is it?<|im_end|>\n<|im_start|>assistant\n", False),
    ("A red bar.<|im_end|>", True),
    ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Yes.<|im_end|>", True),
    ("\n", False),
)

TINY = (
    TinyFamily(
        name="qwen2_vl",
        family=Qwen2VLFamily(),
        facts=tiny_facts(
            Qwen2VLFamily.models[0],
            architecture("qwen2_vl", {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}),
            num_language_linears=14,
            image_px=64,
            image_settings=IMAGE_SETTINGS,
        ),
        conversation=CONVERSATION,
        caps_px=(8, 40),
    ),
    TinyFamily(
        name="qwen2_5_vl",
        family=Qwen25VLFamily(),
        facts=tiny_facts(
            Qwen25VLFamily.models[0],
            architecture(
                "qwen2_5_vl",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "out_hidden_size": 64,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
            ),
            num_language_linears=14,
            image_px=64,
            image_settings=IMAGE_SETTINGS,
        ),
        conversation=CONVERSATION,
        caps_px=(8, 40),
    ),
)
