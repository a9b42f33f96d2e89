"""Contradictions between settings of different sections, as far as they can be seen without the card or the model."""

from __future__ import annotations

import difflib
from functools import reduce
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from eightgig.config.clash import Clash
from eightgig.config.enums import Batching, OptimizerName, TrainingMethod
from eightgig.config.preset_cards import PRESET_CARDS
from eightgig.config.values import shown

if TYPE_CHECKING:
    from eightgig.config.schema import TrainingConfig


def check_preset_name(name: str) -> None:
    """Raise a pydantic error that names the nearest preset where there is none called `name`."""
    if name in PRESET_CARDS:
        return
    raise PydanticCustomError("preset", "{allowed}", {"allowed": preset_names_text(name)})


def preset_names_text(name: str) -> str:
    """What could stand instead of the unknown preset `name`: the nearest one first, then all."""
    nearest = difflib.get_close_matches(name, PRESET_CARDS, n=1, cutoff=0.4)
    guess = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{guess}one of {', '.join(PRESET_CARDS)}"


def contradictions(config: TrainingConfig) -> list[Clash]:
    """Every pair of settings of `config` that can't both hold."""
    return [
        *_against_preset(config),
        *_without_gpu(config),
        *_without_checkpointing(config),
        *_without_tiles(config),
        *_in_uneven_passes(config),
        *_in_shared_rows(config),
        *_trained_on_host(config),
        *_tower_alone_in_4bit(config),
    ]


def value_at(config: Any, path: str) -> Any:
    """The value of the setting at the dotted `path` of `config`."""
    return reduce(getattr, path.split("."), config)


def _against_preset(config: TrainingConfig) -> list[Clash]:
    """Values that the named preset can't do without on its card."""
    if config.preset is None:
        return []
    card = PRESET_CARDS[config.preset]
    clashes = []
    for path, reason in card.fixed.items():
        value, needed = value_at(config, path), card.choices[path].value
        if value != needed:
            clashes.append(
                Clash(
                    path=tuple(path.split(".")),
                    value=value,
                    allowed=f"{shown(needed)} with preset = {card.name}, made for {card.card_gib} GB: {reason}; "
                    "name a preset for a larger card, or none",
                    other="preset",
                )
            )
    return clashes


def _without_gpu(config: TrainingConfig) -> list[Clash]:
    """Settings that only a GPU gives a meaning, where the CPU was asked for."""
    if config.hardware.device != "cpu":
        return []
    clashes = []
    if config.hardware.cap_gib is not None:
        clashes.append(
            Clash(
                path=("hardware", "cap_gib"),
                value=config.hardware.cap_gib,
                allowed="null with hardware.device = cpu: the cap is on what PyTorch reserves on a GPU",
                other="hardware.device",
            )
        )
    if config.training.optimizer is OptimizerName.PAGED_ADAMW_8BIT:
        clashes.append(
            Clash(
                path=("training", "optimizer"),
                value=config.training.optimizer.value,
                allowed="auto, adamw or adamw_8bit with hardware.device = cpu: pages move between a GPU and the RAM",
                other="hardware.device",
            )
        )
    return clashes


def _without_checkpointing(config: TrainingConfig) -> list[Clash]:
    """Settings about checkpointed layers, where none is checkpointed."""
    hardware = config.hardware
    if hardware.gradient_checkpointing:
        return []
    settings = {"checkpointed_layers": None, "offload_layer_inputs": False}  # and their neutral values
    return [
        Clash(
            path=("hardware", name),
            value=getattr(hardware, name),
            allowed=f"{shown(neutral)} with hardware.gradient_checkpointing = false: no layer is recomputed",
            other="hardware.gradient_checkpointing",
        )
        for name, neutral in settings.items()
        if getattr(hardware.levers, name) != neutral
    ]


def _without_tiles(config: TrainingConfig) -> list[Clash]:
    """Projections in tiles, where no tile is said."""
    if not config.hardware.tiled_projections or config.hardware.levers.mlp_tile_tokens is not None:
        return []
    return [
        Clash(
            path=("hardware", "tiled_projections"),
            value=True,
            allowed="false with hardware.mlp_tile_tokens = null: it says how many tokens a tile has",
            other="hardware.mlp_tile_tokens",
        )
    ]


def _in_shared_rows(config: TrainingConfig) -> list[Clash]:
    """Several micro-batches in a pass of one row."""
    together = config.hardware.levers.micro_batches_per_pass
    if config.training.batching is not Batching.PACKED or together == 1:
        return []
    return [
        Clash(
            path=("hardware", "micro_batches_per_pass"),
            value=together,
            allowed="1 where samples share rows: a pass takes one row, which can't be divided",
            other="training.batching",
        )
    ]


def _in_uneven_passes(config: TrainingConfig) -> list[Clash]:
    """Passes that would not hold as many micro-batches each."""
    accumulation, together = config.training.gradient_accumulation_steps, config.hardware.levers.micro_batches_per_pass
    if accumulation % together == 0:
        return []
    return [
        Clash(
            path=("hardware", "micro_batches_per_pass"),
            value=together,
            allowed=f"a divisor of training.gradient_accumulation_steps = {accumulation}: every pass takes as many",
            other="training.gradient_accumulation_steps",
        )
    ]


def _trained_on_host(config: TrainingConfig) -> list[Clash]:
    """Weights that are to stay in RAM although they are trained, or are not stored in 4 bits."""
    clashes = []
    method = config.training.method
    if config.hardware.levers.embedding_on_host and method is TrainingMethod.FULL:
        clashes.append(
            Clash(
                path=("hardware", "embedding_on_host"),
                value=True,
                allowed="false with training.method = full: it trains the embeddings, which must then lie on the GPU",
                other="training.method",
            )
        )
    if config.hardware.levers.streamed_layers and not config.training.quantization.load_in_4bit:
        clashes.append(
            Clash(
                path=("hardware", "streamed_layers"),
                value=config.hardware.streamed_layers,
                allowed=f"0 with training.method = {method.value}: only 4-bit weights are streamed",
                other="training.method",
            )
        )
    return clashes


def _tower_alone_in_4bit(config: TrainingConfig) -> list[Clash]:
    """A tower in 4 bits below a language model in 16: far less of it would be saved than of the language model."""
    training = config.training
    if training.quantization.load_in_4bit or not training.quantization.vision_tower:
        return []
    return [
        Clash(
            path=("training", "quantization", "vision_tower"),
            value=True,
            allowed=f"false with training.method = {training.method.value}: 4-bit weights are for method qlora",
            other="training.method",
        )
    ]
