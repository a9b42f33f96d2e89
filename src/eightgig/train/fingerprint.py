"""Hashes of what must be the same when a run goes on: its settings, its data, and what it trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import reduce
from operator import getitem

from torch import nn

from eightgig.config import TrainingConfig

# Settings that change where and how fast a run goes, and never what it computes.
WITHOUT_EFFECT_ON_RESULT = (
    ("output_dir",),
    ("data", "num_workers"),
    ("data", "worker_start_method"),
    ("hardware", "cap_gib"),
    ("hardware", "feature_cache_gib"),
    ("hardware", "rehearsal"),
    ("checkpoints",),
)


def fingerprint(config: TrainingConfig, data_fingerprint: str, trainable: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The hashes, each under the name that an error message gives it."""
    settings = config.model_dump(mode="json")
    for *sections, key in WITHOUT_EFFECT_ON_RESULT:
        reduce(getitem, sections, settings).pop(key)
    shapes = {name: list(parameter.shape) for name, parameter in trainable.items()}
    return {
        "configuration": _sha256(settings),
        "training data": data_fingerprint,
        "set of trainable weights": _sha256(shapes),
    }


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
