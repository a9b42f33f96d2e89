"""Saving what was trained so that plain PEFT and transformers load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eightgig.core.files import whole_folder
from eightgig.models.trainable import write_adapter


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter of the PeftModel `model` to `folder`, whole or not at all."""
    with whole_folder(folder) as partial:
        write_adapter(model, partial)


def save_full_model(model: Any, processor: Any, folder: Path) -> None:
    """Write the fully trained transformers model and its processor to `folder`, whole or not at all."""
    with whole_folder(folder) as partial:
        model.save_pretrained(str(partial))
        processor.save_pretrained(str(partial))
