"""The training and validation samples of a run: checked, split, and what was changed about them said aloud."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, fields
from typing import Any

from eightgig.config import DataConfig, TrainingConfig
from eightgig.core.files import write_json
from eightgig.data.check import CheckReport, check_samples
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sets import ReadData
from eightgig.data.sources import SampleSet
from eightgig.data.split import split_validation
from eightgig.train.events import TrainingListener
from eightgig.train.run import DataSets
from eightgig.train.run_folder import RunFolder

SECONDS_BETWEEN_MESSAGES = 5.0


def check_data(
    read: ReadData, config: TrainingConfig, encoder: Encoder, folder: RunFolder, listener: TrainingListener
) -> DataSets:
    """Check every sample, split off validation, and write what was found to data.json and quarantine.jsonl.

    Raises:
        DataError: too large a share of the samples is bad.
    """
    reports = {}
    for name, samples in (("training", read.train), ("validation", read.validation)):
        if samples is not None:
            reports[name] = _check(name, samples, read.quarantine, config, encoder, listener)
    write_json(folder.data, {name: _record(read_set, reports[name]) for name, read_set in _sets(read).items()})
    train_samples = reports["training"].samples
    if "validation" in reports:
        validation_samples = reports["validation"].samples
    else:
        train_samples, validation_samples = split_validation(train_samples, config.data.val_fraction, config.seed)
    size_of = dict(zip(map(id, reports["training"].samples), reports["training"].sizes, strict=True))
    image_bytes = [
        image.path.stat().st_size for sample in train_samples for image in sample.images if image.path is not None
    ]
    return DataSets(
        train=train_samples,
        train_sizes=tuple(size_of[id(sample)] for sample in train_samples),
        validation=validation_samples[: config.validation.max_samples],
        fingerprint=_sha256_of((train_samples, image_bytes)),
        num_quarantined=len(read.quarantine),
        num_cut_prompt_samples=sum(report.num_shortened_prompts for report in reports.values()),
        num_cut_answer_samples=sum(report.num_shortened_answers for report in reports.values()),
        has_images=reports["training"].num_images > 0,
        files={
            str(file.path): f"sha256 {file.sha256[:12]}..."
            for read_set in _sets(read).values()
            for file in read_set.manifest
        }
        | {"the training images": f"{len(image_bytes)} files of {sum(image_bytes):,} bytes"},
    )


def _sets(read: ReadData) -> dict[str, SampleSet]:
    sets = {"training": read.train}
    return sets if read.validation is None else sets | {"validation": read.validation}


def _check(
    name: str,
    samples: SampleSet,
    quarantine: Quarantine,
    config: TrainingConfig,
    encoder: Encoder,
    listener: TrainingListener,
) -> CheckReport:
    listener.on_message(f"checking {len(samples.samples):,} {name} samples")
    last_message = time.monotonic()

    def say_progress(num_done: int, num_samples: int) -> None:
        nonlocal last_message
        if time.monotonic() - last_message > SECONDS_BETWEEN_MESSAGES:
            last_message = time.monotonic()
            listener.on_message(f"checked {num_done:,} of {num_samples:,}")

    report = check_samples(
        samples, encoder, quarantine, max_bad_fraction=config.data.max_bad_fraction, on_progress=say_progress
    )
    for text in _changes(report, config.data):
        listener.on_message(f"{name} data: {text}")
    return report


def _changes(report: CheckReport, settings: DataConfig) -> list[str]:
    """What was changed about the samples, a sentence each."""
    limit = f"data.max_length = {settings.max_length} text tokens"
    changes = []
    if report.num_shortened_prompts:
        changes.append(f"{report.num_shortened_prompts} prompts lose {report.num_cut_prompt_tokens} tokens to {limit}")
    if report.num_shortened_answers:
        changes.append(f"{report.num_shortened_answers} answers lose {report.num_cut_answer_tokens} tokens to {limit}")
    if report.num_escaped:
        changes.append(f"{report.num_escaped} special tokens spelled out in texts were broken up")
    return changes


def _record(samples: SampleSet, report: CheckReport) -> dict[str, Any]:
    """The part of data.json about one set: its files, and all counts of the check."""
    counts = {item.name: getattr(report, item.name) for item in fields(report) if item.name not in ("samples", "sizes")}
    files = [asdict(file) | {"path": str(file.path)} for file in samples.manifest]
    return {"files": files, "num_samples": len(report.samples)} | counts


def _sha256_of(samples_and_sizes: object) -> str:
    """Hash of the samples' ids, texts and image paths, in order, and the images' sizes: what decides what a step sees.

    An image that is changed and keeps its size in bytes goes unnoticed; reading all of them again would take minutes.
    """
    return hashlib.sha256(repr(samples_and_sizes).encode()).hexdigest()
