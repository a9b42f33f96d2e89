"""LLaVA-OneVision, tiny: tiles of 16 px with 16 tokens, grids of up to 6 × 6 of them, features of at most 9."""

from __future__ import annotations

from eightgig.registry.llava_onevision import LlavaOnevisionFamily
from tiny_family import TinyFamily, tiny_facts

TILE_SIDES = range(16, 97, 16)
FACTS = tiny_facts(
    LlavaOnevisionFamily.models[0],
    {
        "model_type": "llava_onevision",
        "image_token_index": 303,
        "video_token_index": 304,
        "image_grid_pinpoints": [[height, width] for height in TILE_SIDES for width in TILE_SIDES],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "bos_token_id": 300,
            "eos_token_id": 302,
            "tie_word_embeddings": True,
        },
    },
    num_language_linears=14,
    image_px=96,
)

# Of two images each is one tile: 4 × 4 tokens, and one that ends it.
IMAGE = "<image>" * 17

TINY = (
    TinyFamily(
        name="llava_onevision",
        family=LlavaOnevisionFamily(),
        facts=FACTS,
        conversation=(
            (f"<|im_start|>user {IMAGE}{IMAGE}\nWhat is it?<|im_end|><|im_start|>assistant \n", False),
            ("A red bar.<|im_end|>", True),
            ("<|im_start|>user \nSure?<|im_end|><|im_start|>assistant \n", False),
            ("Yes.<|im_end|>", True),
        ),
        caps_px=(8, 16, 40, 64),
    ),
)
