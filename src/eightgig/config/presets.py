"""`ConfigPresets`: a configuration for the card at hand in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightgig.config import layers
from eightgig.config.layers import Layer
from eightgig.config.loading import resolve_layers
from eightgig.config.preset_cards import PRESET_CARDS, PresetCard
from eightgig.config.schema import TrainingConfig


class ConfigPresets:
    """Ready configurations, one for each size of card; `card` tells what a preset holds and why.

    Each takes the data and, as `overrides`, further settings by dotted path: `{"training.max_steps": 100}`.
    Raises ConfigError where an override is wrong or contradicts the preset.
    """

    @classmethod
    def ultra_low_memory(
        cls,
        *,
        data_path: Path | str | None = None,
        val_path: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainingConfig:
        """QLoRA for 8 GB: rank 8, one sample at a time, 512 text tokens, 336 px."""
        return _build("ultra_low_memory", data_path, val_path, overrides)

    @classmethod
    def low_memory(
        cls,
        *,
        data_path: Path | str | None = None,
        val_path: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainingConfig:
        """QLoRA for 12 GB: rank 16, 1,024 text tokens."""
        return _build("low_memory", data_path, val_path, overrides)

    @classmethod
    def balanced(
        cls,
        *,
        data_path: Path | str | None = None,
        val_path: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainingConfig:
        """QLoRA for 16 GB: rank 32, two samples at a time, the model's own image size."""
        return _build("balanced", data_path, val_path, overrides)

    @classmethod
    def high_quality(
        cls,
        *,
        data_path: Path | str | None = None,
        val_path: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainingConfig:
        """LoRA on 16-bit weights for 24 GB: rank 64, 2,048 text tokens."""
        return _build("high_quality", data_path, val_path, overrides)

    @classmethod
    def full(
        cls,
        *,
        data_path: Path | str | None = None,
        val_path: Path | str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> TrainingConfig:
        """Full fine-tuning for 80 GB."""
        return _build("full", data_path, val_path, overrides)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The presets' names, from the smallest card to the largest."""
        return tuple(PRESET_CARDS)

    @classmethod
    def card(cls, name: str) -> PresetCard:
        """The data of a preset: its card, each value and the reason for it."""
        return PRESET_CARDS[name]


def _build(
    name: str, data_path: Path | str | None, val_path: Path | str | None, overrides: Mapping[str, Any] | None
) -> TrainingConfig:
    values: dict[str, Any] = {"preset": name}
    if data_path is not None:
        values["data.data_path"] = data_path
    if val_path is not None:
        values["data.val_path"] = val_path
    layer = Layer(f"preset {name}", layers.nested({**values, **(overrides or {})}))
    return resolve_layers([layer]).config
