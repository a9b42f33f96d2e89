"""Writing, verifying and reading one checkpoint folder.

step-00000050/
├── manifest.json          format, step, fingerprint of run, and the size and SHA-256 of every other file
├── state.json             optimizer, schedule and scaler: what JSON can hold
├── state.safetensors      … and their tensors
└── adapter/               as PEFT writes it, for any tool to load (`trainable.safetensors` for full fine-tuning)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from eightgig.checkpoint.codec import from_json_and_tensors, to_json_and_tensors
from eightgig.core.errors import CheckpointError
from eightgig.core.files import whole_folder, write_json
from eightgig.models.trainable import load_trainable, save_trainable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE_JSON = "state.json"
STATE_TENSORS = "state.safetensors"
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: the step it was taken after, and the nested state of everything but the weights."""

    path: Path
    step: int
    state: Mapping[str, Any]


def step_folder_name(step: int) -> str:
    """Folder name of the checkpoint after `step`; sorts like the number."""
    return f"step-{step:08d}"


def write_checkpoint(
    folder: Path, *, step: int, model: nn.Module, state: Mapping[str, Any], fingerprint: Mapping[str, str]
) -> Path:
    """Write the checkpoint after `step` below `folder`, whole or not at all; returns its path.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        model: its trainable weights are saved.
        state: nested state of optimizer, schedule and scaler.
        fingerprint: hashes of what must be the same on resume, by name (config, data, trainable names).

    Raises:
        DoesNotFit: the disk is full; nothing is left behind.
    """
    path = folder / step_folder_name(step)
    with whole_folder(path) as temporary:
        save_trainable(model, temporary)
        encoded, tensors = to_json_and_tensors(dict(state))
        write_json(temporary / STATE_JSON, encoded)
        save_file(tensors, temporary / STATE_TENSORS)
        files = {
            item.relative_to(temporary).as_posix(): {"bytes": item.stat().st_size, "sha256": _sha256(item)}
            for item in sorted(temporary.rglob("*"))
            if item.is_file()
        }
        write_json(
            temporary / MANIFEST,
            {"format_version": FORMAT_VERSION, "step": step, "fingerprint": dict(fingerprint), "files": files},
        )
    return path


def read_checkpoint(path: Path, model: nn.Module, *, fingerprint: Mapping[str, str]) -> Checkpoint:
    """Verify the checkpoint at `path`, load its weights into `model` and return the rest.

    Raises:
        CheckpointError: a file is missing or altered, or the checkpoint belongs to another config or data set.
    """
    manifest = verify_checkpoint(path)
    _check_fingerprint(path, manifest["fingerprint"], fingerprint)
    load_trainable(model, path)
    encoded = json.loads((path / STATE_JSON).read_text(encoding="utf-8"))
    state = from_json_and_tensors(encoded, load_file(path / STATE_TENSORS))
    return Checkpoint(path, int(manifest["step"]), state)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, after every file was checked against it.

    Raises:
        CheckpointError: naming the first file that is missing, of the wrong size or altered.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise _damaged(path, f"{manifest_path} is missing")
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text(encoding="utf-8"))
        files = manifest["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _damaged(path, f"{manifest_path} can't be read ({error})") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('format_version')!r}",
            expected=f"format {FORMAT_VERSION}",
            next_step="resume with the EightGig version that wrote it",
        )
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise _damaged(path, f"the content of {name} was altered (its SHA-256 differs)")
    return manifest


def _check_fingerprint(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    if differing:
        raise CheckpointError(
            f"{path} was written with another {' and another '.join(differing)}",
            expected="the same configuration, training data and trainable weights as when the run began",
            next_step="put back what was changed, or start a new run with `eightgig train`",
        )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged: {what}",
        expected="every file as its manifest lists it",
        next_step=f"delete {path} and resume again: the checkpoint before it is used",
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
