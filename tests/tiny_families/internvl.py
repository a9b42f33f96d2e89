"""InternVL3.5, tiny: tiles of 32 px and 4 tokens, at most four and a thumbnail."""

from __future__ import annotations

from eightgig.registry.internvl import InternVLFamily
from tiny_family import TinyFamily, tiny_facts

ARCHITECTURE = {
    "model_type": "internvl",
    "image_token_id": 310,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": [32, 32],
        "patch_size": [8, 8],
    },
    "text_config": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "tie_word_embeddings": False,
        "bos_token_id": 282,
        "eos_token_id": 284,
    },
}


def image(num_tiles: int) -> str:
    """What an image becomes."""
    return f"<img>{'<IMG_CONTEXT>' * 4 * num_tiles}</img>\n"


TINY = (
    TinyFamily(
        name="internvl",
        family=InternVLFamily(),
        facts=tiny_facts(
            InternVLFamily.models[0],
            ARCHITECTURE,
            num_language_linears=14,
            image_px=64,
            image_settings={"size": {"height": 32, "width": 32}, "min_patches": 1, "max_patches": 4},
        ),
        # 53 × 37 is nearer to a square than to two tiles side by side, and too small for four; 29 × 61 takes two, one
        # above the other, and the thumbnail.
        conversation=(
            (f"<|im_start|>user\n{image(1)}{image(3)}What is it?<|im_end|>\n<|im_start|>assistant\n", False),
            ("A red bar.<|im_end|>", True),
            ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
            ("Yes.<|im_end|>", True),
            ("\n", False),
        ),
        caps_px=(20, 60, 64),
    ),
)
