"""Gemma 3, tiny: images of 32 px, 16 tokens each; a layer of window attention and one of full."""

from __future__ import annotations

from eightgig.registry.gemma3 import GEMMA_3_4B, Gemma3Family
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    GEMMA_3_4B,
    {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "vocab_size": 320,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_use_head": False,
        },
        "boi_token_index": 300,
        "eoi_token_index": 301,
        "image_token_index": 302,
        "mm_tokens_per_image": 16,
        "tie_word_embeddings": True,
    },
    num_language_linears=14,
    image_px=32,
)

IMAGE = f"\n\n<start_of_image>{'<image_soft_token>' * 16}<end_of_image>\n\n"

TINY = (
    TinyFamily(
        name="gemma3",
        family=Gemma3Family(),
        facts=FACTS,
        conversation=(
            (f"<bos><start_of_turn>user\n{IMAGE}{IMAGE}What is it?<end_of_turn>\n<start_of_turn>model\n", False),
            ("A red bar.<end_of_turn>", True),
            ("\n<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n", False),
            ("Yes.<end_of_turn>", True),
            ("\n", False),
        ),
        caps_px=(336,),
    ),
)
