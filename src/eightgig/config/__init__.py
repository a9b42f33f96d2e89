"""Settings of a run: `TrainingConfig` and its sections, presets, files. The only thing a user writes."""

from eightgig.config.enums import Batching, MixedPrecision, OptimizerName, TrainingMethod, WhenDiskIsFull
from eightgig.config.loading import FlagValue, ResolvedConfig, Row, describe, load_config, resolve, save_config
from eightgig.config.preset_cards import PresetCard
from eightgig.config.presets import ConfigPresets
from eightgig.config.schema import (
    SCHEMA_VERSION,
    CheckpointConfig,
    DataConfig,
    HardwareConfig,
    LoRAConfig,
    ModelConfig,
    QuantizationConfig,
    TrainingConfig,
    TrainingHyperparameters,
    ValidationConfig,
)
from eightgig.config.shape import json_schema

__all__ = [
    "SCHEMA_VERSION",
    "Batching",
    "CheckpointConfig",
    "ConfigPresets",
    "DataConfig",
    "FlagValue",
    "HardwareConfig",
    "LoRAConfig",
    "MixedPrecision",
    "ModelConfig",
    "OptimizerName",
    "PresetCard",
    "QuantizationConfig",
    "ResolvedConfig",
    "Row",
    "TrainingConfig",
    "TrainingHyperparameters",
    "TrainingMethod",
    "ValidationConfig",
    "WhenDiskIsFull",
    "describe",
    "json_schema",
    "load_config",
    "resolve",
    "save_config",
]
