"""The weights that learn, saved and put back. PEFT's own files for adapters, one safetensors file otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER_FOLDER = "adapter"
FULL_WEIGHTS = "trainable.safetensors"


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that learns, by full name, in the order of names (so that optimizer states line up on resume)."""
    return {name: value for name, value in sorted(model.named_parameters()) if value.requires_grad}


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter into `folder` as PEFT lays it out.

    adapter_config.json names the base model as it was loaded: a hub id, or the path of a folder.
    """
    # The embeddings never change here, and asking the hub whether they did would need a network.
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Write what learns below `folder`: `adapter/` as PEFT writes it, or `trainable.safetensors` without adapters."""
    if isinstance(model, PeftModel):
        write_adapter(model, folder / ADAPTER_FOLDER)
        return
    save_file(weights_to_save(model), folder / FULL_WEIGHTS)


def weights_to_save(model: nn.Module) -> dict[str, Tensor]:
    """What `save_trainable` writes: adapters where they lie, as PEFT collects them; else copies on the host."""
    if isinstance(model, PeftModel):
        collected: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        return collected
    return {name: value.detach().to("cpu", copy=True) for name, value in trainable_parameters(model).items()}


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Put the weights that `save_trainable` wrote below `folder` back into `model`, bit for bit."""
    if isinstance(model, PeftModel):
        weights = load_peft_weights(str(folder / ADAPTER_FOLDER), device="cpu")
        set_peft_model_state_dict(model, weights)
        return
    weights = load_file(folder / FULL_WEIGHTS)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(weights[name])
