"""Qwen3.5, tiny: a DeltaNet layer and a layer of attention with gated output."""

from __future__ import annotations

from eightgig.registry.qwen3_5 import Qwen35Family
from tiny_families.qwen2_vl import CONVERSATION, IMAGE_SETTINGS, architecture
from tiny_family import TinyFamily, tiny_facts

ARCHITECTURE = architecture(
    "qwen3_5",
    {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64, "num_position_embeddings": 64},
)
_, FIRST, ANSWER, BETWEEN, LAST_ANSWER, END = CONVERSATION

TINY = (
    TinyFamily(
        name="qwen3_5",
        family=Qwen35Family(),
        facts=tiny_facts(
            Qwen35Family.models[0],
            {
                **ARCHITECTURE,
                "text_config": {
                    **ARCHITECTURE["text_config"],
                    "head_dim": 32,
                    "layer_types": ["linear_attention", "full_attention"],
                    "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4,
                    "linear_key_head_dim": 16,
                    "linear_value_head_dim": 16,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "partial_rotary_factor": 0.5,
                        "mrope_section": [2, 3, 3],
                        "mrope_interleaved": True,
                    },
                },
            },
            num_language_linears=13,
            image_px=64,
            image_settings=IMAGE_SETTINGS,
        ),
        # The model's last answer follows an empty thought, which is the template's and not to be learnt.
        conversation=(FIRST, ANSWER, BETWEEN, ("<think>\n\n</think>\n\n", False), LAST_ANSWER, END),
        caps_px=(8, 40),
    ),
)
