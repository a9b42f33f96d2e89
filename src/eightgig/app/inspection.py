"""`eightgig inspect`: the answer to "is it really 4-bit?"."""

from __future__ import annotations

import json
from pathlib import Path

from eightgig.config import ModelConfig, TrainingConfig
from eightgig.core.errors import CheckpointError
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
    if folder.is_run:
        if not folder.receipt.is_file():
            raise CheckpointError(
                f"the run {target} has no receipt: it ended before its model was loaded",
                expected="a run that came to its first step, or a model",
                next_step="look at the reason in its run.json, and start it again",
            )
        return Receipt.from_json(json.loads(folder.receipt.read_text(encoding="utf-8")))
    config = TrainingConfig(model=ModelConfig(name=target, random_weights_seed=random_weights_seed))
    place = choose_place(config)
    return load_model(config, resolve(target), place.device, place.precision).receipt
