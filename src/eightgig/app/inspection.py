"""`eightgig inspect`: the answer to "is it really 4-bit?"."""

from __future__ import annotations

import json
from pathlib import Path

from eightgig.config import ModelConfig, TrainingConfig
from eightgig.models.load import load_model
from eightgig.models.receipt import Receipt
from eightgig.registry import resolve
from eightgig.train.run_folder import RunFolder
from eightgig.train.setup import choose_place


def inspect(target: str, *, random_weights_seed: int | None = None) -> Receipt:
    """The receipt of a run (as it was written when the run loaded its model), or of a model, loaded in 4 bits now.

    Args:
        target: a run's folder, or a model: registry name, folder or hub id.
        random_weights_seed: build the model with random weights instead of loading its own.

    Raises:
        CheckpointError: the folder holds a run without a receipt.
        UnsupportedModel: the model is unknown, or was not stored as asked.
    """
    folder = RunFolder(Path(target))
    if folder.config.is_file() and folder.receipt.is_file():
        return Receipt.from_json(json.loads(folder.receipt.read_text(encoding="utf-8")))
    config = TrainingConfig(model=ModelConfig(name=target, random_weights_seed=random_weights_seed))
    place = choose_place(config)
    return load_model(config, resolve(target), place.device, place.precision).receipt
