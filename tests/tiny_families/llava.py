"""LLaVA-1.5 at a thousandth of a thousandth of its size."""

from __future__ import annotations

from eightgig.registry.llava import LLAVA_1_5_7B, LlavaFamily
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    LLAVA_1_5_7B,
    {
        "model_type": "llava",
        "image_token_index": 300,
        "pad_token_id": 301,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "projection_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
    },
    num_language_linears=14,
    image_px=32,
)

IMAGE = "<image>" * 16

TINY = (
    TinyFamily(
        name="llava",
        family=LlavaFamily(),
        facts=FACTS,
        conversation=(
            (f"<s>USER: {IMAGE}\n{IMAGE}\nWhat is it? ASSISTANT:", False),
            (" A red bar.</s>", True),
            (" USER: Sure? ASSISTANT:", False),
            (" Yes.</s>", True),
            (" ", False),
        ),
        caps_px=(16, 48),
    ),
)
