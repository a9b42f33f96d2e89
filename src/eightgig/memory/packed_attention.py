"""Attention within each sample of a row that several share: one call a sample, and no mask of tokens × tokens.

transformers lets a program name an attention function of its own (`AttentionInterface`), and what masks are made for it
(`AttentionMaskInterface`). This one is transformers' SDPA, called on each sample's stretch of the row. Keyword
arguments of the model's forward reach it, and are kept where a layer is computed again. The lengths are Python's
numbers: nothing waits for the card, and the planner sees what a run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ATTENTION = "eightgig_samples"
"""transformers' `attn_implementation` of a language model whose rows may hold several samples."""

LENGTHS = "segment_lengths"
"""The keyword argument of a model's forward that tells how many tokens each sample of the row has."""


def attend_within_samples(language_model: Any) -> None:
    """Have `language_model`, of transformers, attend within samples where its forward is given LENGTHS.

    Without them it does what it does with SDPA. Its config alone changes, in what transformers keeps of it while the
    model lives.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    language_model.set_attn_implementation(ATTENTION)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Sequence[int] = (),
    **arguments: Any,
) -> tuple[Tensor, None]:
    """[batch, tokens, heads, head size] of `query`, `key` and `value` [batch, heads, tokens, head size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not segment_lengths:
        whole: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return whole, None
    stretches = zip(*(torch.split(each, list(segment_lengths), dim=2) for each in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *stretch, None, **arguments)[0] for stretch in stretches]
    return torch.cat(outputs, dim=1), None


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """SDPA's mask; none where the model is given none: then a row is full, and attention causal within each sample."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and kv_length == q_length:
        return None
    mask: Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **arguments)
    return mask
