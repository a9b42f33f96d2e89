"""Llama 3.2 Vision, tiny: a cross-attention layer between two of self-attention, up to 4 tiles of 16 px."""

from __future__ import annotations

from eightgig.registry.mllama import LLAMA_3_2_11B_VISION, MllamaFamily
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    LLAMA_3_2_11B_VISION,
    {
        "model_type": "mllama",
        "image_token_index": 320,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 192,
            "max_num_tiles": 4,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1],
            "vocab_size": 320,
            "bos_token_id": 300,
            "eos_token_id": 309,
            "pad_token_id": 304,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "tie_word_embeddings": False,
        },
    },
    num_language_linears=21,
    image_px=32,
)

USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"

TINY = (
    TinyFamily(
        name="mllama",
        family=MllamaFamily(),
        facts=FACTS,
        conversation=(
            (f"<|begin_of_text|>{USER}<|image|><|image|>What is it?<|eot_id|>{ASSISTANT}", False),
            ("A red bar.<|eot_id|>", True),
            (f"{USER}Sure?<|eot_id|>{ASSISTANT}", False),
            ("Yes.<|eot_id|>", True),
        ),
        caps_px=(8, 40),
    ),
)
