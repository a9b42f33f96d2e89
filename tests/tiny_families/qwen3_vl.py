"""Qwen3-VL, tiny: DeepStack features from the tower's first layer into the decoder's first."""

from __future__ import annotations

from eightgig.registry.qwen3_vl import Qwen3VLFamily
from tiny_families.qwen2_vl import CONVERSATION, IMAGE_SETTINGS, TEXT, architecture
from tiny_family import TinyFamily, tiny_facts

ARCHITECTURE = architecture(
    "qwen3_vl",
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
)

TINY = (
    TinyFamily(
        name="qwen3_vl",
        family=Qwen3VLFamily(),
        facts=tiny_facts(
            Qwen3VLFamily.models[0],
            {
                **ARCHITECTURE,
                "text_config": {
                    **ARCHITECTURE["text_config"],
                    "head_dim": 16,
                    "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True},
                },
                "tie_word_embeddings": False,
            },
            num_language_linears=14,
            image_px=64,
            image_settings=IMAGE_SETTINGS,
        ),
        conversation=CONVERSATION[1:],  # no system's turn by default
        caps_px=(8, 40),
    ),
)
