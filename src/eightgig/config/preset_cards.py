"""The presets as data: for which card, which values, and why each. `ConfigPresets` builds configurations from them.

Sources of the numbers: LLaVA-1.5's weights are 13.2 GiB (7B) and 24.9 GiB (13B) in 16 bits, 4.2 and 7.3 GiB with the
language model in NF4 (counted on the published architectures, as are the trainable weights of each rank); activations
of the 7B model at 1,088 positions are 10.4 GiB without checkpointing and 0.7 GiB with it (simulated). Rates and batch
sizes are those of LLaVA-1.5's own recipe (`finetune_lora.sh`) and of the QLoRA paper (arXiv 2305.14314), which also
found that LoRA on every linear layer matters and the rank hardly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One value of a preset and its reason."""

    value: Any
    reason: str


@dataclass(frozen=True)
class PresetCard:
    """A named set of values for one size of card.

    Attributes:
        name: what the user types.
        card: the card it is made for, with examples.
        card_gib: that card's memory.
        purpose: what it is good for, in one line.
        choices: dotted path of a setting to its value and reason; everything else keeps its default.
        fixed: dotted paths that can't be changed while the preset is named, each with the reason.
    """

    name: str
    card: str
    card_gib: int
    purpose: str
    choices: Mapping[str, Choice]
    fixed: Mapping[str, str]


_NEEDS_CHECKPOINTING = "without it the activations of a 7B model alone take more than 10 GiB at 1,088 tokens"
_NEEDS_4BIT = "16-bit weights (methods lora and full) of a 7B model alone take 13.2 GiB"

_QLORA_WEIGHTS = {
    "training.method": Choice("qlora", "frozen 4-bit weights are what lets a 7B model fit beside its activations"),
    "training.quantization.load_in_4bit": Choice(True, "a 7B model's weights shrink from 13.2 GiB to about 4.2 GiB"),
    "training.quantization.bnb_4bit_quant_type": Choice("nf4", "closer to the 16-bit weights than fp4 (QLoRA paper)"),
    "training.quantization.bnb_4bit_use_double_quant": Choice(True, "saves 0.37 bits a weight: 0.3 GiB on a 7B model"),
    "training.quantization.bnb_4bit_compute_dtype": Choice("auto", "the mixed precision's type, so no extra casts"),
}
_BF16 = Choice("bf16", "the range of fp32, so no loss scaling; a card without native bf16 gets fp16, and says so")
_LORA_RATE = Choice(2e-4, "the rate of LLaVA-1.5's LoRA recipe and of the QLoRA paper at 7B")
_CHECKPOINTING = Choice(
    True, "recomputes each layer in the backward pass: about a third more time, under a tenth of the memory"
)
_EFFECTIVE_32 = "with batch_size 32 samples a step: smooth enough for the learning rate"

ULTRA_LOW_MEMORY = PresetCard(
    name="ultra_low_memory",
    card="8 GB (RTX 4060, RTX 3070, RTX 2080)",
    card_gib=8,
    purpose="QLoRA of a 7B model in the least memory",
    choices={
        **_QLORA_WEIGHTS,
        "training.lora.rank": Choice(8, "20 M trainable weights at 7B; the rank matters little to quality"),
        "training.lora.alpha": Choice(16, "twice the rank: updates are scaled by 2"),
        "training.batch_size": Choice(1, "one sample at a time keeps the activations smallest"),
        "training.gradient_accumulation_steps": Choice(32, _EFFECTIVE_32),
        "training.learning_rate": _LORA_RATE,
        "training.loss_chunk_tokens": Choice(256, "at most 156 MB of fp32 logits at once, even with 152,000 words"),
        "data.max_length": Choice(512, "text tokens; with the 576 of one LLaVA image 1,088 positions a sample"),
        "data.image_size": Choice(336, "the size LLaVA-1.5 was trained with; a cap for models with dynamic sizes"),
        "hardware.mixed_precision": _BF16,
        "hardware.gradient_checkpointing": _CHECKPOINTING,
    },
    fixed={
        "hardware.gradient_checkpointing": _NEEDS_CHECKPOINTING,
        "training.quantization.load_in_4bit": _NEEDS_4BIT,
    },
)

LOW_MEMORY = PresetCard(
    name="low_memory",
    card="12 GB (RTX 3060, RTX 4070)",
    card_gib=12,
    purpose="QLoRA of a 7B model with longer texts, or of a 13B model",
    choices={
        **_QLORA_WEIGHTS,
        "training.lora.rank": Choice(16, "40 M trainable weights at 7B: room for more than one kind of question"),
        "training.lora.alpha": Choice(32, "twice the rank: updates are scaled by 2"),
        "training.batch_size": Choice(1, "leaves room for 13B, whose weights take 7.3 GiB in 4 bits"),
        "training.gradient_accumulation_steps": Choice(32, _EFFECTIVE_32),
        "training.learning_rate": _LORA_RATE,
        "training.loss_chunk_tokens": Choice(512, "at most 311 MB of fp32 logits at once, even with 152,000 words"),
        "data.max_length": Choice(1024, "text tokens: several turns about one image"),
        "data.image_size": Choice(336, "the size LLaVA-1.5 was trained with; a cap for models with dynamic sizes"),
        "hardware.mixed_precision": _BF16,
        "hardware.gradient_checkpointing": _CHECKPOINTING,
    },
    fixed={
        "hardware.gradient_checkpointing": _NEEDS_CHECKPOINTING,
        "training.quantization.load_in_4bit": _NEEDS_4BIT,
    },
)

BALANCED = PresetCard(
    name="balanced",
    card="16 GB (RTX 4060 Ti 16 GB, RTX 4080, T4)",
    card_gib=16,
    purpose="QLoRA of a 7B or 13B model, faster and with the model's own image size",
    choices={
        **_QLORA_WEIGHTS,
        "training.lora.rank": Choice(32, "80 M trainable weights at 7B; memory allows it, quality seldom needs more"),
        "training.lora.alpha": Choice(64, "twice the rank: updates are scaled by 2"),
        "training.batch_size": Choice(2, "fewer, larger kernels: less time a sample than one at a time"),
        "training.gradient_accumulation_steps": Choice(16, _EFFECTIVE_32),
        "training.learning_rate": _LORA_RATE,
        "data.max_length": Choice(1024, "text tokens: several turns about one image"),
        "data.image_size": Choice(None, "the model's own size: nothing is interpolated or scaled down"),
        "hardware.mixed_precision": _BF16,
        "hardware.gradient_checkpointing": _CHECKPOINTING,
    },
    fixed={"training.quantization.load_in_4bit": _NEEDS_4BIT},
)

HIGH_QUALITY = PresetCard(
    name="high_quality",
    card="24 GB (RTX 3090, RTX 4090, A10)",
    card_gib=24,
    purpose="LoRA of a 7B model on 16-bit weights: no quantisation error",
    choices={
        "training.method": Choice("lora", "16-bit weights fit this card, so nothing is lost to rounding"),
        "training.quantization.load_in_4bit": Choice(
            False, "13.2 GiB of 16-bit weights at 7B leave 10 GiB for the rest"
        ),
        "training.lora.rank": Choice(64, "160 M trainable weights at 7B: room for broad tasks"),
        "training.lora.alpha": Choice(128, "twice the rank: updates are scaled by 2"),
        "training.batch_size": Choice(2, "fewer, larger kernels: less time a sample than one at a time"),
        "training.gradient_accumulation_steps": Choice(16, _EFFECTIVE_32),
        "training.learning_rate": _LORA_RATE,
        "data.max_length": Choice(2048, "text tokens, the length of LLaVA-1.5's own recipe"),
        "data.image_size": Choice(None, "the model's own size: nothing is interpolated or scaled down"),
        "hardware.mixed_precision": _BF16,
        "hardware.gradient_checkpointing": _CHECKPOINTING,
    },
    fixed={},
)

FULL = PresetCard(
    name="full",
    card="80 GB (A100 80 GB, H100)",
    card_gib=80,
    purpose="full fine-tuning of a 7B model",
    choices={
        "training.method": Choice("full", "every weight learns"),
        "training.quantization.load_in_4bit": Choice(False, "4-bit weights can't be trained themselves"),
        "training.lora": Choice(None, "every weight learns, so there are no adapters"),
        "training.optimizer": Choice(
            "adamw_8bit", "its state takes 2 bytes a weight instead of 8: 13 GiB at 7B, not 53"
        ),
        "training.batch_size": Choice(4, "keeps the card busy; activations are small beside weights and gradients"),
        "training.gradient_accumulation_steps": Choice(
            32, "with batch_size 128 samples a step, LLaVA-1.5's own recipe"
        ),
        "training.num_epochs": Choice(1, "LLaVA-1.5's own recipe; full fine-tuning forgets faster than LoRA"),
        "training.learning_rate": Choice(2e-5, "LLaVA-1.5's own recipe: a tenth of what adapters take"),
        "data.max_length": Choice(2048, "text tokens, the length of LLaVA-1.5's own recipe"),
        "data.image_size": Choice(None, "the model's own size: nothing is interpolated or scaled down"),
        "hardware.mixed_precision": _BF16,
        "hardware.gradient_checkpointing": _CHECKPOINTING,
    },
    fixed={},
)

PRESET_CARDS: Mapping[str, PresetCard] = {
    card.name: card for card in (ULTRA_LOW_MEMORY, LOW_MEMORY, BALANCED, HIGH_QUALITY, FULL)
}
