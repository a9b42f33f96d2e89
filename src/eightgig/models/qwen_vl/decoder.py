"""A layer of the language model, under the published module names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from eightgig.models.qwen_vl.configuration import QwenVLConfig
from eightgig.models.qwen_vl.rotary import rotate


class Positions(NamedTuple):
    """What the attention layers of one forward pass know about the tokens' places.

    Attributes:
        angles: rotary cosines and sines, fp32 [tokens, head size] each.
        query_factors: [tokens, 1] in the dtype of the queries; None where every one is 1.
    """

    angles: tuple[Tensor, Tensor]
    query_factors: Tensor | None


class QwenVLRMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., hidden] scaled to a mean square of 1, times the weight; its dtype is kept."""
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return scaled.to(hidden.dtype) * self.weight


class QwenVLAttention(nn.Module):
    """Causal self-attention; queries, keys and values come out of one linear layer, one after another."""

    def __init__(self, config: QwenVLConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_size = config.kv_channels
        self.dropout = config.attn_dropout_prob
        inner_size = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * inner_size)
        self.c_proj = nn.Linear(inner_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, hidden: Tensor, mask: Tensor | None, positions: Positions, cache: Any | None) -> Tensor:
        """The attention's output for `hidden`, both [batch, tokens, hidden].

        Args:
            hidden: the layer's normalised input.
            mask: [batch, 1, tokens, keys], True where a query may look; None for plain causal attention.
            positions: of the tokens in `hidden`.
            cache: a transformers cache that gets the new keys and values and gives back all; None without one.
        """
        batch, num_tokens, _ = hidden.shape
        states = self.c_attn(hidden).view(batch, num_tokens, 3, -1, self.head_size)
        query, key, value = states.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotate(query, positions.angles), rotate(key, positions.angles)
        if positions.query_factors is not None:
            query = query * positions.query_factors
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and num_tokens > 1,
        )
        projected: Tensor = self.c_proj(output.transpose(1, 2).flatten(2))
        return projected


class QwenVLMLP(nn.Module):
    """Gated MLP; w2 is the gate."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The MLP's output for `hidden`, both [batch, tokens, hidden]."""
        output: Tensor = self.c_proj(self.w1(hidden) * functional.silu(self.w2(hidden)))
        return output


class QwenVLBlock(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers is untyped
    """A decoder layer."""

    def __init__(self, config: QwenVLConfig, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer_index)
        self.ln_2 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, positions: Positions, past_key_values: Any | None = None
    ) -> Tensor:
        """The layer's output for `hidden`, both [batch, tokens, hidden]; the other arguments as in QwenVLAttention."""
        hidden = hidden + self.attn(self.ln_1(hidden), mask, positions, past_key_values)
        output: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return output
