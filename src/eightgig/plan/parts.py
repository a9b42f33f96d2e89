"""Tells a recorder which part of the model is at work, so that what is allocated gets its category."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eightgig.plan.categories import ADAPTERS, LOSS, OTHER, VISION, WEIGHTS_4BIT, WEIGHTS_16BIT
from eightgig.plan.recorder import Recorder
from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.registry import ModelSpec


def label_weights(model: nn.Module, recorder: Recorder) -> None:
    """Put the weights of `model` into their categories."""
    for name, parameter in model.named_parameters():
        category = ADAPTERS if ".lora_" in name else WEIGHTS_16BIT
        is_4bit = getattr(parameter, "quant_state", None) is not None
        recorder.label(weight_tensors(parameter), WEIGHTS_4BIT if is_4bit else category)


def tell_parts(model: Any, spec: ModelSpec, recorder: Recorder) -> None:
    """Have `recorder` told when a vision tower begins and ends, and when the head begins.

    What comes after the head is the loss, and its backward pass, until the first layer's begins (`LayerMemo` tells).
    """
    modules = spec.family.modules
    root = base_model(model)
    for path in modules.towers:
        tower = root.get_submodule(path)
        tower.register_forward_pre_hook(_switch(recorder, VISION))
        tower.register_forward_hook(_switch(recorder, OTHER))
    root.get_submodule(modules.language_model).register_forward_pre_hook(_switch(recorder, OTHER))
    root.get_submodule(modules.lm_head).register_forward_pre_hook(_switch(recorder, LOSS))


def _switch(recorder: Recorder, category: str) -> Any:
    def hook(*_: Any) -> None:
        recorder.category = category

    return hook


def weight_tensors(parameter: Any) -> Iterator[Tensor]:
    """The tensors of a weight: itself, and the scales of a 4-bit one."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield state.absmax
        if state.state2 is not None:
            yield state.state2.absmax
