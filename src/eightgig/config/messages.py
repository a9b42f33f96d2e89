"""From pydantic's errors to problems a user understands: full path, the value, what is allowed, the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from eightgig.config import shape
from eightgig.config.clash import CLASH
from eightgig.config.fields import UNKNOWN_KEY
from eightgig.config.values import shown
from eightgig.core.errors import Problem

Location = tuple[str | int, ...]

_OWN_ERRORS = (
    CLASH,
    "preset",
    "schema_version",
    "pattern",
    "blank",
    "streamed_layers",
)  # raised by this room: their text says it all

# What other trainers call a setting of ours, where the nearest spelling would not find it.
_FOREIGN_NAMES = {
    "lr": "training.learning_rate",
    "epochs": "training.num_epochs",
    "num_train_epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "group_by_length": "training.batching",
    "packing": "training.batching",
    "sample_packing": "training.batching",
    "lr_scheduler_type": "training.lr_schedule",
    "optim": "training.optimizer",
    "r": "training.lora.rank",
    "lora_r": "training.lora.rank",
    "lora_rank": "training.lora.rank",
    "lora_alpha": "training.lora.alpha",
    "lora_dropout": "training.lora.dropout",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length",
    "bf16": "hardware.mixed_precision",
    "fp16": "hardware.mixed_precision",
    "model_name_or_path": "model.name",
    "save_total_limit": "checkpoints.keep_last",
    "save_steps": "checkpoints.every_steps",
    "eval_steps": "validation.every_steps",
}


def fresh_errors(error: ValidationError, reported: Collection[Location]) -> list[ErrorDetails]:
    """Pydantic's errors in its order, less those about a location that was `reported` before.

    A contradiction with such a location is left out as well: it may be gone once that setting is right.
    """
    return [
        details
        for details in error.errors(include_url=False)
        if details["loc"] not in reported and _other_location(details) not in reported
    ]


def problem(details: ErrorDetails) -> Problem:
    """What the user is told of one of pydantic's errors."""
    path = _dotted(details["loc"])
    if details["type"] in _OWN_ERRORS:
        allowed = details["msg"]
    elif details["type"] == UNKNOWN_KEY:
        allowed = _unknown(details["loc"])
    else:
        allowed = shape.allowed(path)
    return Problem(path or "configuration", shown(details["input"]), allowed)


def _dotted(location: Iterable[str | int]) -> str:
    """The path of a setting as the user writes it."""
    return ".".join(str(part) for part in location)


def _other_location(details: ErrorDetails) -> Location | None:
    """Where the other setting of a contradiction stands; None for every other kind of error."""
    return tuple(str(details["ctx"]["other"]).split(".")) if details["type"] == CLASH else None


def _unknown(location: Location) -> str:
    """That a key is unknown, and the one that was probably meant."""
    section, key = _dotted(location[:-1]), str(location[-1])
    if key in shape.all_paths():
        return "dots are for --set only; in a file the groups are nested, one key a level"
    nearest = _nearest_path(section, key)
    if nearest is not None:
        return f"unknown setting; did you mean {nearest}?"
    where = f"{section} has" if section else "the top level has"
    return f"unknown setting; {where} {', '.join(shape.section_keys(section))}"


def _nearest_path(section: str, key: str) -> str | None:
    """Dotted path of the setting that `key` in `section` probably means: in the section first, then anywhere."""
    siblings = difflib.get_close_matches(key, shape.section_keys(section), n=1, cutoff=0.7)
    if siblings:
        return f"{section}.{siblings[0]}" if section else siblings[0]
    if key in _FOREIGN_NAMES:
        return _FOREIGN_NAMES[key]
    by_leaf: Mapping[str, str] = {path.rsplit(".", 1)[-1]: path for path in reversed(shape.all_paths())}
    anywhere = difflib.get_close_matches(key, by_leaf, n=1, cutoff=0.7)
    return by_leaf[anywhere[0]] if anywhere else None
