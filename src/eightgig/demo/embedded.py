"""Where the embedded model lies in the installed package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def model_folder() -> Path:
    """The folder of the model that ships in the package: weights, tokenizer and processor, for `from_pretrained`."""
    return Path(str(resources.files("eightgig.demo").joinpath("model")))
