"""The vision side: a ViT whose patches a resampler turns into a fixed number of tokens.

All linear layers are plain `nn.Linear`, so that bitsandbytes can store them in 4 bits. The published layout is kept
but for the resampler's attention (see `load_map`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from eightgig.models.qwen_vl.configuration import NORM_EPSILON, QwenVLVisionConfig

NUM_CHANNELS = 3
NUM_TABLE_POSITIONS = 256  # 16 × 16: the tower was pretrained on 224 px
SINUSOID_BASE = 10000.0


def grid_positions(table: Tensor, num_positions: int) -> Tensor:
    """`table` [rows, width] of a square grid, resized to [num_positions, width] of another one; its dtype is kept."""
    old_side, new_side = math.isqrt(table.shape[0]), math.isqrt(num_positions)
    if old_side == new_side:
        return table
    grid = table.float().view(1, old_side, old_side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


def sinusoid_table(width: int, num_positions: int) -> Tensor:
    """The resampler's fixed position table, fp32 [num_positions, width], of a square grid, row by row.

    The first half of a row is the sines and cosines of the column, the second half those of the line, at the
    frequencies 10000^(-i / (width / 4)). Source: the 2-D sin-cos table of masked autoencoders, which the model uses.
    """
    side = math.isqrt(num_positions)
    frequencies = 1.0 / SINUSOID_BASE ** (np.arange(width // 4, dtype=np.float32) / np.float32(width / 4))
    angles = np.outer(np.arange(side, dtype=np.float32), frequencies)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    of_columns, of_lines = np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)
    return torch.from_numpy(np.concatenate([of_columns, of_lines], axis=1)).float()


class VisionAttention(nn.Module):
    """Self-attention over all patches. The rows of `in_proj` go head by head: its queries, its keys, its values."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """The attention's output for `hidden`, both [images, patches, width]."""
        num_images, num_patches, width = hidden.shape
        states = self.in_proj(hidden).view(num_images, num_patches, self.num_heads, 3, width // self.num_heads)
        query, key, value = states.permute(3, 0, 2, 1, 4).unbind(0)
        output = functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return projected


class VisionMLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """The MLP's output for `hidden`, both [images, patches, width]."""
        output: Tensor = self.c_proj(functional.gelu(self.c_fc(hidden)))
        return output


class VisionBlock(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers is untyped
    """A pre-norm transformer block."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.attn = VisionAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output for `hidden`, both [images, patches, width]."""
        hidden = hidden + self.attn(self.ln_1(hidden))
        output: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return output


class VisionBlocks(nn.Module):
    """The blocks of the tower, in order."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """The last block's output for `hidden`, both [images, patches, width]."""
        for block in self.resblocks:
            hidden = block(hidden)
        return hidden


class ResamplerAttention(nn.Module):
    """Cross-attention with linear layers of their own for queries, keys and values."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.resampler_heads
        self.q_proj = nn.Linear(config.output_dim, config.output_dim)
        self.k_proj = nn.Linear(config.output_dim, config.output_dim)
        self.v_proj = nn.Linear(config.output_dim, config.output_dim)
        self.out_proj = nn.Linear(config.output_dim, config.output_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What `query` [queries, hidden] finds in `key` and `value` [images, patches, hidden], for each image."""
        queries = self._heads(self.q_proj(query).unsqueeze(0)).expand(key.shape[0], -1, -1, -1)
        output = functional.scaled_dot_product_attention(
            queries, self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        )
        projected: Tensor = self.out_proj(output.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, states: Tensor) -> Tensor:
        """[images, tokens, hidden] as [images, heads, tokens, head size]."""
        return states.view(*states.shape[:2], self.num_heads, -1).transpose(1, 2)


class Resampler(nn.Module):
    """Learned queries on a grid gather from all patches; places enter the queries and keys, not the values."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.n_queries, config.output_dim))
        # Never trained, but part of every published checkpoint.
        self.pos_embed = nn.Parameter(torch.empty(config.n_queries, config.output_dim), requires_grad=False)
        self.kv_proj = nn.Linear(config.width, config.output_dim, bias=False)
        self.attn = ResamplerAttention(config)
        self.ln_q = nn.LayerNorm(config.output_dim, eps=NORM_EPSILON)
        self.ln_kv = nn.LayerNorm(config.output_dim, eps=NORM_EPSILON)

    def forward(self, patches: Tensor) -> Tensor:
        """Features [images, queries, hidden] of `patches` [images, patches, width]."""
        value = self.ln_kv(self.kv_proj(patches))
        table = self.pos_embed.detach()  # loading a checkpoint makes every parameter a trainable one
        key = value + grid_positions(table, patches.shape[1])
        features: Tensor = self.attn(self.ln_q(self.query) + table, key, value)
        return features


class QwenVLVisionTower(nn.Module):
    """From pixels to features in the language model's space."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(NUM_CHANNELS, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(NUM_TABLE_POSITIONS, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=NORM_EPSILON)
        self.transformer = VisionBlocks(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=NORM_EPSILON)
        self.proj = nn.Parameter(torch.empty(config.output_dim, config.output_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features [images, queries, hidden] of `pixel_values` [images, 3, side, side], in the tower's own dtype."""
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        patches = patches + grid_positions(self.positional_embedding, patches.shape[1])
        features = self.attn_pool(self.transformer(self.ln_pre(patches)))
        projected: Tensor = self.ln_post(features) @ self.proj
        return projected
