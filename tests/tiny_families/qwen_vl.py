"""Qwen-VL, tiny: images of 56 px, 16 tokens each."""

from __future__ import annotations

from eightgig.registry.qwen_vl import QwenVLFamily
from tiny_family import TinyFamily, tiny_facts

FACTS = tiny_facts(
    QwenVLFamily.models[0],
    {
        "model_type": "qwen",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 64,
        "intermediate_size": 256,
        "visual": {
            "heads": 2,
            "image_size": 56,
            "image_start_id": 470,
            "layers": 2,
            "mlp_ratio": 2.0,
            "n_queries": 16,
            "output_dim": 128,
            "patch_size": 14,
            "width": 64,
        },
    },
    num_language_linears=10,
    image_px=56,
)

IMAGE = f"<img>{'<imgpad>' * 16}</img>\n"

TINY = (
    TinyFamily(
        name="qwen_vl",
        family=QwenVLFamily(),
        facts=FACTS,
        conversation=(
            ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False),
            (f"<|im_start|>user\nPicture 1: {IMAGE}Picture 2: {IMAGE}What is it?<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("A red bar.<|im_end|>", True),
            ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", False),
            ("Yes.<|im_end|>", True),
            ("\n", False),
        ),
        quantised=r"transformer\.(h\.\d+\.(attn|mlp)|visual)\..*(c_attn|c_proj|w1|w2|c_fc|(in|out|kv|q|k|v)_proj)",
        caps_px=(28, 112),
    ),
)
