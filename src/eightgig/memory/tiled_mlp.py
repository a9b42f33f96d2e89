"""Long rows in tiles: a decoder layer's MLP is computed for some tokens at a time, so that the rest of its wide inner
tensors never exist (ALST, arXiv 2506.13996, has it for whole rows over several cards). So can be the norms and linear
layers around attention, whose adapters compute with fp32 copies of their input.

The backward pass computes each tile again, forward and backward, before the next. In a layer that is checkpointed this
costs nothing more: the MLP's input is kept ahead of its tiles (`memory.kept_tensors`), and computing the layer again
stops there, unless something behind the MLP keeps its output (Gemma's norm after it does: there the MLP runs a third
time). In a layer that stays whole it costs one more forward pass of the MLP.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from eightgig.memory.kept_tensors import KeptTensors


@dataclass(frozen=True)
class _Tiling:
    """How one MLP is computed in tiles.

    Attributes:
        forward: of the MLP, [1, tokens, hidden] to [1, tokens, any width]; each token by itself.
        tile_tokens: of one tile.
        preserve_rng_state: make the second pass draw the same random numbers.
    """

    forward: Callable[..., Any]
    tile_tokens: int
    preserve_rng_state: bool


def tile_mlps(mlps: Sequence[nn.Module], tile_tokens: int, *, preserve_rng_state: bool) -> None:
    """Wrap the forward of each of `mlps`, on that instance, to take at most `tile_tokens` tokens at a time.

    It acts in training and outside of it; a row of at most `tile_tokens` tokens goes through as it was.

    Args:
        mlps: modules that map [..., tokens, hidden] to [..., tokens, any width], each token by itself, and take
            nothing else: MLPs, linear layers, norms.
        tile_tokens: at least 1.
        preserve_rng_state: make the second pass draw the same random numbers as the first; needed with dropout.
    """
    for mlp in mlps:
        mlp.forward = _tiled(mlp, _Tiling(mlp.forward, tile_tokens, preserve_rng_state))


def _tiled(mlp: nn.Module, tiling: _Tiling) -> Callable[..., Any]:
    @functools.wraps(tiling.forward)
    def wrapped(hidden: Tensor) -> Tensor:
        if hidden.numel() <= tiling.tile_tokens * hidden.shape[-1]:
            whole: Tensor = tiling.forward(hidden)
            return whole
        parameters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        learns = torch.is_grad_enabled() and (hidden.requires_grad or bool(parameters))
        if not learns:
            return _in_tiles(tiling, hidden)
        # Checkpointing stops computing again as soon as it has met all that is kept: here, before the tiles.
        kept = KeptTensors(hidden)
        output: Tensor = _TiledMlp.apply(tiling, kept, hidden, *parameters)  # type: ignore[no-untyped-call]
        return output

    return wrapped


def _in_tiles(tiling: _Tiling, hidden: Tensor) -> Tensor:
    """The MLP's output, [..., tokens, its width], put together from tiles; without a graph."""
    tiles = _split(hidden, tiling.tile_tokens)
    first = tiling.forward(tiles[0])
    output: Tensor = first.new_empty((*hidden.shape[:-1], first.shape[-1]))
    parts = _split(output, tiling.tile_tokens)
    parts[0].copy_(first)
    del first
    for part, tile in zip(parts[1:], tiles[1:], strict=True):
        part.copy_(tiling.forward(tile))
    return output


def _split(tensor: Tensor, tile_tokens: int) -> tuple[Tensor, ...]:
    """Tiles of `tensor` [..., hidden], each [1, at most tile_tokens, hidden]; views where it is contiguous."""
    return torch.split(tensor.reshape(1, -1, tensor.shape[-1]), tile_tokens, dim=1)


class _TiledMlp(torch.autograd.Function):
    """The MLP, computed again tile by tile in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tiling: _Tiling, kept: KeptTensors, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.tiling, ctx.kept, ctx.parameters = tiling, kept, parameters
        ctx.surroundings = _Surroundings(hidden, preserve_rng_state=tiling.preserve_rng_state)
        return _in_tiles(tiling, hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("the backward pass of an MLP in tiles goes through its graph once")
        (hidden,) = ctx.kept.hand_back()
        # With it goes what the layer's checkpoint keeps; the graph's nodes stay until the pass has ended.
        ctx.kept = None
        tiling, parameters = ctx.tiling, ctx.parameters
        hidden_learns = ctx.needs_input_grad[2]
        hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if hidden_learns else None
        sums: list[Tensor | None] = [None] * len(parameters)
        tiles, gradients = _split(hidden.detach(), tiling.tile_tokens), _split(gradient, tiling.tile_tokens)
        begin = 0
        with ctx.surroundings.again(), torch.enable_grad():
            for tile, tile_gradient in zip(tiles, gradients, strict=True):
                leaf = tile.detach().requires_grad_(hidden_learns)
                wanted = [*([leaf] if hidden_learns else []), *parameters]
                # As a view, since autocast keeps what it casts of a leaf: all tiles, and added up in 16 bits.
                output = tiling.forward(leaf.view_as(leaf))
                found = list(torch.autograd.grad(output, wanted, tile_gradient, allow_unused=True))
                del output
                if hidden_gradient is not None:
                    end = begin + tile.shape[1]
                    hidden_gradient.view(1, -1, hidden.shape[-1])[:, begin:end].copy_(found.pop(0))
                    begin = end
                for place, part in enumerate(found):
                    if part is not None:
                        total = sums[place]
                        sums[place] = part if total is None else total.add_(part)
        return None, None, hidden_gradient, *sums


class _Surroundings:
    """The autocast state, and with `preserve_rng_state` the random generators', when a forward pass began."""

    def __init__(self, hidden: Tensor, *, preserve_rng_state: bool) -> None:
        self._device_type = hidden.device.type
        self._is_autocast = torch.is_autocast_enabled(self._device_type)
        self._autocast_dtype = torch.get_autocast_dtype(self._device_type)
        self._preserves = preserve_rng_state
        if preserve_rng_state:
            self._cpu_state = torch.get_rng_state()
            self._devices, self._device_states = get_device_states(hidden)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the state is what it was then."""
        with (
            torch.random.fork_rng(devices=self._devices if self._preserves else [], enabled=self._preserves),
            torch.autocast(self._device_type, dtype=self._autocast_dtype, enabled=self._is_autocast),
        ):
            if self._preserves:
                torch.set_rng_state(self._cpu_state)
                set_device_states(self._devices, self._device_states)
            yield
