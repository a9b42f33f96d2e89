"""PaliGemma 2, tiny: images of 32 px, 16 tokens each; a layer of window attention and one of full."""

from __future__ import annotations

from eightgig.registry.paligemma import PALIGEMMA_2_3B, PaliGemmaFamily
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    PALIGEMMA_2_3B,
    {
        "model_type": "paligemma",
        "text_config": {
            "model_type": "gemma2",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            # So low that a head without the cap, or scores without theirs, would show.
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 1.0,
            "vocab_size": 320,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        "image_token_index": 300,
        "hidden_size": 64,
        "projection_dim": 64,
        "tie_word_embeddings": True,
    },
    num_language_linears=14,
    image_px=32,
)

IMAGE = "<image>" * 16

TINY = (
    TinyFamily(
        name="paligemma",
        family=PaliGemmaFamily(),
        facts=FACTS,
        conversation=(
            (f"{IMAGE}{IMAGE}<bos>What is it?\n", False),
            ("A red bar.<eos>", True),
            ("Sure?\n", False),
            ("Yes.<eos>", True),
        ),
        caps_px=(224,),
        # It has no chat template to be called with.
        processor_call=False,
    ),
)
