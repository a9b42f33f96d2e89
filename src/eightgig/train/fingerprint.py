"""Hashes of what must be the same when a run goes on: its settings, its data, and what it trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any

from torch import nn

from eightgig.config import TrainingConfig
from eightgig.train.run import Run

# Settings that change where and how fast a run goes, and never what it computes.
WITHOUT_EFFECT_ON_RESULT = (
    ("output_dir",),
    ("data", "num_workers"),
    ("data", "worker_start_method"),
    ("data", "worker_timeout_s"),
    ("hardware", "cap_gib"),
    ("hardware", "feature_cache_gib"),
    ("training", "max_skipped_steps"),
    ("hardware", "rehearsal"),
    ("checkpoints",),
)


def fingerprint_of(run: Run) -> dict[str, str]:
    """The hashes of `run`."""
    return fingerprint(run.config, run.data.fingerprint, run.trainable)


def details_of(run: Run) -> dict[str, dict[str, Any]]:
    """What stands behind the hashes of `run`, under the same names: settings by path, files by path, shapes by name.

    Also what has no effect on the hashes: settings that only change where and how fast, and the validation data.
    """
    return {
        "configuration": dict(_leaves(run.config.model_dump(mode="json"))),
        "training data": dict(run.data.files),
        "set of trainable weights": _shapes(run.trainable),
    }


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shapes(trainable: Mapping[str, nn.Parameter]) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in trainable.items()}


def fingerprint(config: TrainingConfig, data_fingerprint: str, trainable: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The hashes, each under the name that an error message gives it."""
    settings = config.model_dump(mode="json")
    for *sections, key in WITHOUT_EFFECT_ON_RESULT:
        reduce(getitem, sections, settings).pop(key)
    return {
        "configuration": _sha256(settings),
        "training data": data_fingerprint,
        "set of trainable weights": _sha256(_shapes(trainable)),
    }


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
