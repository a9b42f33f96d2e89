"""Gemma 4, tiny: 8 px a token, 70 tokens an image at most; two layers of each kind, the last of which share keys."""

from __future__ import annotations

from eightgig.registry.gemma4 import GEMMA_4_E2B, Gemma4Family, has_own_processor
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    GEMMA_4_E2B,
    {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 32,
            "final_logit_softcapping": 2.0,
            "hidden_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 24,
            "use_double_wide_mlp": True,
            "vocab_size": 320,
            "vocab_size_per_layer_input": 320,
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
            "use_clipped_linears": True,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 8],
            "output_proj_dims": 64,
        },
        "boi_token_id": 300,
        "eoi_token_id": 301,
        "image_token_id": 302,
        "boa_token_id": 303,
        "eoa_token_index": 304,
        "audio_token_id": 305,
        "video_token_id": 306,
        "tie_word_embeddings": True,
    },
    num_language_linears=24,
    image_px=66,
    image_settings={"max_soft_tokens": 70},
)


def image(num_tokens: int) -> str:
    """What an image becomes."""
    return f"<|image>{'<|image|>' * num_tokens}<image|>"


# 70 squares of 8 px: 53 × 37 becomes 10.01 × 6.99 of them, so 10 × 6; 29 × 61 becomes 5.8 × 12.1, so 5 × 12.
TINY = (
    TinyFamily(
        name="gemma4",
        family=Gemma4Family(),
        facts=FACTS,
        conversation=(
            (f"<bos><|turn>user\n{image(60)}{image(60)}What is it?<turn|>\n<|turn>model\n", False),
            ("A red bar.<turn|>", True),
            ("\n<|turn>user\nSure?<turn|>\n<|turn>model\n", False),
            ("Yes.<turn|>", True),
            ("\n", False),
        ),
        caps_px=(8, 100),
        processor_call=has_own_processor(),
    ),
)
