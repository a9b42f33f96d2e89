"""The files of a run's data, read: training samples, and validation samples where they have files of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eightgig.core.errors import ConfigError, Problem
from eightgig.data.quarantine import Quarantine
from eightgig.data.sources import SampleSet, load_samples

if TYPE_CHECKING:
    from eightgig.config import DataConfig


@dataclass(frozen=True)
class ReadData:
    """What the data files hold, before any image is opened or any model is known.

    Attributes:
        validation: None where a share of the training samples is held out.
        quarantine: gathers bad records of both sets.
    """

    train: SampleSet
    validation: SampleSet | None
    quarantine: Quarantine


def read_data(settings: DataConfig, quarantine: Quarantine) -> ReadData:
    """Read the files that `settings` names; the first thing a run does, since it costs nothing and often fails.

    Raises:
        ConfigError: no training data is named.
        DataError: a path is missing or its shape unknown.
    """
    if settings.data_path is None:
        raise ConfigError(
            [Problem("data.data_path", "null", "a .json or .jsonl file, or a folder of images with captions")],
            source="training data",
            next_step="give it with --data PATH, or in the config file",
        )
    return ReadData(
        train=load_samples(settings.data_path, settings.image_root, quarantine),
        validation=load_samples(settings.val_path, settings.image_root, quarantine) if settings.val_path else None,
        quarantine=quarantine,
    )
