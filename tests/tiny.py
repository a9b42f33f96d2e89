"""Small stand-ins that tests share: a LLaVA model with its processor, images of any mode, data files.

The model is built from its config (no download), has about 0.23 M parameters, and all inner sizes are multiples of 64,
so that its linears can be held in NF4 with the usual block of 64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN = "<image>"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN)

# What the published LLaVA-1.5 checkpoints carry: images before texts, a blank after each text, and no end token.
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# A template as the Qwen family has it: parts in their order, and the end token written by the template itself.
ENDING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{{ '</s>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)

_CORPUS = (
    "USER: <image>\nWhat is the colour of the bar? ASSISTANT: It is red.",
    "USER: <image>\nHow many bars are there? ASSISTANT: There are seven bars in the picture.",
    "Describe the image. A red circle is left of a blue square, and a green rod lies below both of them.",
    "You are a helpful assistant. Answer the question with one word: yes, no, red, green, blue, 1, 2, 3, 4, 5.",
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 410 entries that adds one `<s>` in front, as the Llama tokenizers do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return fast


def build_tiny_processor(
    *, image_px: int = 32, patch_px: int = 8, chat_template: str = PUBLISHED_TEMPLATE
) -> LlavaProcessor:
    """A LlavaProcessor (PIL backend) for images of `image_px`, (image_px / patch_px)² tokens an image."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_px}, crop_size={"height": image_px, "width": image_px}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tiny_tokenizer(),
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def build_tiny_llava(
    folder: Path,
    seed: int = 0,
    image_px: int = 32,
    patch_px: int = 8,
    *,
    chat_template: str = PUBLISHED_TEMPLATE,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
) -> Path:
    """`folder`, holding a LLaVA of about 0.23 M random parameters and its processor, for `from_pretrained`."""
    processor = build_tiny_processor(image_px=image_px, patch_px=patch_px, chat_template=chat_template)
    vocab_size = -(-len(processor.tokenizer) // 64) * 64
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_px,
            patch_size=patch_px,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            pad_token_id=processor.tokenizer.pad_token_id,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        ).to_dict(),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", seed: int = 0) -> Path:
    """`path`, holding a random image of `size` (width, height) in Pillow's `mode`; the suffix chooses the file format.

    RGB images are smooth enough for JPEG to keep; the other modes are noise over their whole range of values.
    """
    generator = np.random.default_rng(seed)
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        pixels = generator.integers(0, 65536, (height, width), dtype=np.uint16)
        Image.fromarray(pixels).save(path)
    elif mode == "P":
        colours = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        colours.quantize(16).save(path)
    elif mode == "1":
        Image.fromarray(generator.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1").save(path)
    elif mode == "RGB":
        corners = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize(size, Image.Resampling.BILINEAR).save(path)
    else:
        num_bands = len(Image.new(mode, (1, 1)).getbands())
        shape = (height, width) if num_bands == 1 else (height, width, num_bands)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode=mode).save(path)
    return path


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """`path`, holding one JSON record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_llava_jsonl(
    folder: Path, num_samples: int = 8, *, seed: int = 0, name: str = "train.jsonl", num_turns: int = 1
) -> Path:
    """The JSONL file `folder/name`: `num_samples` records in the LLaVA shape, each with a PNG in `folder/images`."""
    chooser = random.Random(seed)
    colours = ("red", "green", "blue", "grey", "white")
    records = []
    for index in range(num_samples):
        image = write_image(folder / "images" / f"{Path(name).stem}-{index}.png", seed=seed * 1000 + index)
        turns = []
        for turn in range(num_turns):
            marker = f"{IMAGE_TOKEN}\n" if turn == 0 else ""
            turns.append({"from": "human", "value": f"{marker}What is the colour of bar {turn + index}?"})
            turns.append({"from": "gpt", "value": f"It is {chooser.choice(colours)}."})
        relative = image.relative_to(folder).as_posix()
        records.append({"id": f"{Path(name).stem}-{index}", "image": relative, "conversations": turns})
    return write_jsonl(folder / name, records)
