"""Where a token stands in its row: rotary angles, and what changes beyond the pretraining length in evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ntk_alpha(num_tokens: int, seq_length: int) -> int:
    """By how much the rotary base grows for a row of `num_tokens`, pretrained on rows of `seq_length` tokens.

    1 up to `seq_length`, then 3, 7, 15, ... for each doubling. Source: the published model's own dynamic NTK rule.
    """
    if num_tokens <= seq_length:
        return 1
    return int(2 ** math.ceil(math.log2(num_tokens / seq_length) + 1)) - 1


def rotary_angles(positions: Tensor, head_size: int, base: float, alpha: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [tokens, head_size], at `positions` [tokens].

    The base is `base · alpha^(d / (d - 2))`, d being the head size: NTK-aware scaling, which leaves the fastest
    frequency as it is and divides the slowest by `alpha`.
    """
    scaled_base = base * alpha ** (head_size / (head_size - 2))
    exponents = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
    angles = torch.outer(positions.float(), 1.0 / scaled_base**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """`states` [batch, heads, tokens, head_size] turned by `angles`, computed in fp32, in their own dtype."""
    cosines, sines = angles
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosines + torch.cat((-second, first), dim=-1) * sines).to(states.dtype)


def logn_factors(positions: Tensor, seq_length: int) -> Tensor:
    """What the queries at `positions` (counted from 0) are multiplied by, fp32 [tokens, 1]: log(n) / log(seq_length).

    n is the position counted from 1; the factor is 1 where n is at most `seq_length`. It keeps the entropy of
    attention over more keys than were pretrained on.
    """
    factors = torch.log((positions + 1).float()) / math.log(seq_length)
    return factors.clamp(min=1.0).unsqueeze(-1)
