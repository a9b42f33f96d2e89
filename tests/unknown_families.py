"""Tiny models of two architectures that no family of the registry has: LLaVA-NeXT (tiles) and GLM-4V (any size)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Glm4vImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from eightgig.registry.facts import transformers_config
from eightgig.registry.llava import CHAT_TEMPLATE
from eightgig.registry.processors import image_text_processor
from eightgig.registry.standin import byte_level_tokenizer
from tiny_families import llava, qwen2_vl

LLAVA_NEXT = {
    **llava.FACTS.architecture,
    "model_type": "llava_next",
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
}
GLM4V = {
    "model_type": "glm4v",
    "image_token_id": 300,
    "image_start_token_id": 301,
    "image_end_token_id": 302,
    "video_token_id": 303,
    "video_start_token_id": 304,
    "video_end_token_id": 305,
    "text_config": {
        **{key: value for key, value in qwen2_vl.TEXT.items() if not key.endswith("token_id")},
        "model_type": "glm4v_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": 307,
    },
    "vision_config": {
        "model_type": "glm4v_vision",
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    },
    "tie_word_embeddings": False,
}


def _save_model(folder: Path, architecture: Mapping[str, Any]) -> Path:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(transformers_config(architecture), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def build_llava_next(folder: Path) -> Path:
    """`folder`, holding the model and its processor: images in up to four tiles and one of the whole."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 300, "<pad>": 301}
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=LLAVA_NEXT["image_grid_pinpoints"],
        ),
        byte_level_tokenizer(special, vocab_size=320, roles=roles),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return _save_model(folder, LLAVA_NEXT)


def build_glm4v(folder: Path) -> Path:
    """`folder`, holding the model and its processor, whose video part is missing."""
    names = ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<|begin_of_video|>")
    special = {name: 300 + index for index, name in enumerate((*names, "<|end_of_video|>", "<|user|>", "<|pad|>"))}
    template = (
        "{%- for message in messages -%}{{- '<|' + message.role + '|>\\n' -}}"
        "{%- for part in message.content -%}"
        "{%- if part.type == 'image' -%}{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}"
        "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
    )
    image_text_processor("Glm4vProcessor")(
        image_processor=Glm4vImageProcessorPil(
            size={"shortest_edge": 256, "longest_edge": 8192}, patch_size=4, merge_size=2, temporal_patch_size=2
        ),
        tokenizer=byte_level_tokenizer(
            special, vocab_size=320, roles={"eos_token": "<|user|>", "pad_token": "<|pad|>"}
        ),
        video_processor=None,
        chat_template=template,
    ).save_pretrained(folder)
    return _save_model(folder, GLM4V)
