"""A folder as the model was published: `.bin` shards under the published names, `qwen.tiktoken`, no processor files."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

NUM_SHARDS = 3
NUM_RANKS = 886  # with it the added tokens get the ids that the recorded config names
CORPUS = (
    "You are a helpful assistant. What is in the picture? Picture 1: a cat, a dog and 3 birds on the red roof.",
    "def area(width: int) -> int:\n\treturn width ** 2  # in px\n\n",
    "你好，世界！图中的狗是什么品种？这是北京和重庆。今天是2023年8月24日。",
    "I'll say it's there; we've seen they'd go... 12345 67.89% (x1,y1),(x2,y2)",
    "한국어 텍스트 ещё русский текст עברית 🙂🙂 🇨🇳",
)


def small_ranks(num_ranks: int = NUM_RANKS) -> dict[bytes, int]:
    """Byte strings and ranks: 256 bytes, what byte-pair training on a few texts joins, then random joins of those."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = bytes_to_unicode()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=sorted(alphabet.values()), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bytes_of = {letter: byte for byte, letter in alphabet.items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(bytes_of[letter] for letter in token): rank for rank, (token, _) in enumerate(by_id)}
    chooser = random.Random(0)
    entries = list(ranks)
    while len(ranks) < num_ranks:
        ranks.setdefault(b"".join(chooser.choices(entries, k=2)), len(ranks))
    return ranks


def write_ranks(path: Path, ranks: Mapping[bytes, int]) -> Path:
    """`path`, holding `ranks` in tiktoken's format."""
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    return path


def write_published_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """`folder`, with `weights` (published names) in shards; the keys that name the dead code are in its files."""
    auto_map = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    _write_json(folder / "config.json", {**config, "auto_map": auto_map, "torch_dtype": "bfloat16"})
    tokenizer_config = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        name = f"pytorch_model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.bin"
        held = dict(sorted(weights.items())[shard::NUM_SHARDS])
        torch.save(held, folder / name)
        weight_map.update(dict.fromkeys(held, name))
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_ranks(folder / "qwen.tiktoken", small_ranks())
    return folder


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
