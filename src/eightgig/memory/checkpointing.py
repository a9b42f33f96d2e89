"""Activation checkpointing: keep each decoder layer's input, and compute what is inside again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(model: nn.Module, layers: Sequence[nn.Module], *, preserve_rng_state: bool) -> None:
    """Wrap the forward of each of `layers`, on that instance, with non-reentrant checkpointing.

    It acts in training mode with gradients enabled; evaluation and generation run the layer as it was. Non-reentrant,
    because the layers' inputs need no gradient when all that is below them is frozen, and because keyword arguments
    pass through.

    Args:
        model: the model that the layers are part of.
        layers: the layers to wrap, each once.
        preserve_rng_state: make the second pass draw the same random numbers as the first; needed with dropout, and
            otherwise a waste of time (it copies the generators' state for each layer).

    Raises:
        ValueError: a layer is not part of the model, or is wrapped already.
    """
    members = {id(module) for module in model.modules()}
    for index, layer in enumerate(layers):
        if id(layer) not in members:
            raise ValueError(f"layer {index} ({type(layer).__name__}) is not part of the model")
        if "forward" in vars(layer):
            raise ValueError(f"the forward of layer {index} ({type(layer).__name__}) is wrapped already")
        layer.forward = _checkpointed(layer, layer.forward, preserve_rng_state)


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], preserve_rng_state: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("a key-value cache would be filled twice by checkpointing: train with use_cache=False")
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **kwargs)

    return wrapped
