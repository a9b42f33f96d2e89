"""The training and validation samples of a run: read, checked, split, and what was changed about them said aloud."""

from __future__ import annotations

import hashlib
from pathlib import Path

from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError, Problem
from eightgig.data.check import CheckReport, check_samples
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sources import load_samples
from eightgig.data.split import split_validation
from eightgig.train.events import TrainingListener
from eightgig.train.run import DataSets


def load_datasets(
    config: TrainingConfig, encoder: Encoder, quarantine_path: Path, listener: TrainingListener
) -> DataSets:
    """The samples that `config.data` names; bad ones are written to `quarantine_path`.

    Raises:
        ConfigError: no training data is named.
        DataError: a path is missing, its shape unknown, or too large a share of its samples is bad.
    """
    settings = config.data
    if settings.data_path is None:
        raise ConfigError(
            [Problem("data.data_path", "null", "a .json or .jsonl file, or a folder of images with captions")],
            source="training data",
            next_step="give it with --data PATH, or in the config file",
        )
    quarantine = Quarantine(quarantine_path)
    train = _read_and_check(config, settings.data_path, encoder, quarantine, listener)
    if settings.val_path is not None:
        validation = _read_and_check(config, settings.val_path, encoder, quarantine, listener)
        reports = [train, validation]
        train_samples, validation_samples = train.samples, validation.samples
    else:
        reports = [train]
        train_samples, validation_samples = split_validation(train.samples, settings.val_fraction, config.seed)
    for report in reports:
        _say_what_was_changed(report, config, listener)
    return DataSets(
        train=train_samples,
        validation=validation_samples[: config.validation.max_samples],
        fingerprint=_sha256_of(train_samples),
        num_quarantined=len(quarantine),
        num_cut_prompt_samples=sum(report.num_shortened_prompts for report in reports),
        num_cut_answer_samples=sum(report.num_shortened_answers for report in reports),
        has_images=train.num_images > 0,
    )


def _read_and_check(
    config: TrainingConfig, path: Path, encoder: Encoder, quarantine: Quarantine, listener: TrainingListener
) -> CheckReport:
    listener.on_message(f"checking {path}")
    samples = load_samples(path, config.data.image_root, quarantine)
    return check_samples(samples, encoder, quarantine, max_bad_fraction=config.data.max_bad_fraction)


def _say_what_was_changed(report: CheckReport, config: TrainingConfig, listener: TrainingListener) -> None:
    limit = f"data.max_length = {config.data.max_length} text tokens"
    if report.num_shortened_prompts:
        listener.on_message(
            f"{report.num_shortened_prompts} prompts lose {report.num_cut_prompt_tokens} tokens in all to {limit}"
        )
    if report.num_shortened_answers:
        listener.on_message(
            f"{report.num_shortened_answers} answers lose {report.num_cut_answer_tokens} tokens in all to {limit}"
        )
    if report.num_escaped:
        listener.on_message(f"{report.num_escaped} special tokens spelled out in texts were broken up")


def _sha256_of(samples: object) -> str:
    """Hash of the samples' ids, texts and image paths, in order: what decides what a step sees."""
    return hashlib.sha256(repr(samples).encode()).hexdigest()
