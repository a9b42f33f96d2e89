"""InstructBLIP, tiny: images of 32 px, four queries."""

from __future__ import annotations

from eightgig.registry.instructblip import INSTRUCTBLIP_VICUNA_7B, InstructBlipFamily
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    INSTRUCTBLIP_VICUNA_7B,
    {
        "model_type": "instructblip",
        "image_token_index": 301,
        "num_query_tokens": 4,
        "vision_config": {
            "model_type": "instructblip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.02,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": 320,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "encoder_hidden_size": 64,
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

IMAGE = "<image>" * 4

TINY = (
    TinyFamily(
        name="instructblip",
        family=InstructBlipFamily(),
        facts=FACTS,
        conversation=(
            (f"{IMAGE}{IMAGE}</s> What is it?", False),
            (" A red bar.</s>", True),
            (" Sure?", False),
            (" Yes.</s>", True),
        ),
        caps_px=(16, 48),
        # It writes the tokens of one image however many there are.
        processor_call=False,
    ),
)
