"""Writing, verifying and reading one checkpoint folder.

step-00000050/
├── manifest.json          format, step, fingerprint and details of the run, size and SHA-256 of every other file
├── state.json             optimizer, schedule and scaler: what JSON can hold
├── state.safetensors      … and their tensors
└── adapter/               as PEFT writes it, for any tool to load (`trainable.safetensors` for full fine-tuning)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from eightgig.checkpoint.codec import from_json_and_tensors, tensor_bytes, to_json_and_tensors
from eightgig.core.errors import CheckpointError
from eightgig.core.files import whole_folder, write_json
from eightgig.models.trainable import load_trainable, save_trainable, trainable_parameters

FORMAT_VERSION = 2  # 2: details, and a hash of the manifest itself
MANIFEST = "manifest.json"
STATE_JSON = "state.json"
STATE_TENSORS = "state.safetensors"
MAX_CHANGES_NAMED = 5
_HASH_BLOCK_BYTES = 1 << 20

Details = Mapping[str, Mapping[str, Any]]
"""What stands behind a fingerprint: for each of its names, values by name, to tell what has changed."""

NO_DETAILS: Details = MappingProxyType({})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        step: optimizer steps done when it was taken.
        state: nested state of everything but the weights.
        changes: what in the details differs from when it was taken, although the fingerprint is the same.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    changes: tuple[str, ...]


def step_folder_name(step: int) -> str:
    """Folder name of the checkpoint after `step`; sorts like the number."""
    return f"step-{step:08d}"


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    state: Mapping[str, Any],
    fingerprint: Mapping[str, str],
    details: Details = NO_DETAILS,
) -> Path:
    """Write the checkpoint after `step` below `folder`, whole or not at all; returns its path.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        model: its trainable weights are saved.
        state: nested state of optimizer, schedule and scaler.
        fingerprint: hashes of what must be the same on resume, by name (config, data, trainable names).
        details: values behind it, so that on resume not only that something has changed can be told, but what.

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
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "fingerprint": dict(fingerprint),
            "details": {name: dict(values) for name, values in details.items()},
            "files": files,
        }
        write_json(temporary / MANIFEST, manifest | {"sha256": _sha256_of_json(manifest)})
    return path


def checkpoint_bytes(model: nn.Module, state: Mapping[str, Any]) -> int:
    """Bytes of the tensors that `write_checkpoint` would write; all else in a checkpoint is thousandths of that."""
    return tensor_bytes(trainable_parameters(model)) + tensor_bytes(state)


def read_checkpoint(
    path: Path, model: nn.Module, *, fingerprint: Mapping[str, str], details: Details = NO_DETAILS
) -> Checkpoint:
    """Verify the checkpoint at `path`, load its weights into `model` and return the rest.

    Raises:
        CheckpointError: a file is missing or altered, or the checkpoint belongs to another config or data set; as far
            as `details` tell, each setting or file that differs is named.
    """
    manifest = verify_checkpoint(path)
    changes = {name: tuple(_changes(manifest["details"].get(name, {}), now)) for name, now in details.items()}
    _check_fingerprint(path, manifest["fingerprint"], fingerprint, changes)
    load_trainable(model, path)
    encoded = json.loads((path / STATE_JSON).read_text(encoding="utf-8"))
    state = from_json_and_tensors(encoded, load_file(path / STATE_TENSORS))
    return Checkpoint(path, manifest["step"], state, tuple(change for some in changes.values() for change in some))


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, after every file was checked against it.

    Raises:
        CheckpointError: naming the first file that is missing, of the wrong size or altered.
    """
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if _sha256(file) != entry["sha256"]:
            raise _damaged(path, f"the content of {name} was altered (its SHA-256 differs)")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise _damaged(path, f"{manifest_path} is missing")
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise _damaged(path, f"{manifest_path} can't be read ({error})") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise _damaged(path, f"{manifest_path} can't be read (it is no manifest)")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format_version']!r}",
            expected=f"format {FORMAT_VERSION}",
            next_step="resume with the EightGig version that wrote it",
        )
    # What it holds has the shape that was written if it is what was written.
    if manifest.pop("sha256", None) != _sha256_of_json(manifest):
        raise _damaged(path, f"the content of {MANIFEST} was altered (its SHA-256 differs)")
    return manifest


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Each value of `now` that is another than in `before`, in words."""
    now = json.loads(json.dumps(now))  # as the manifest gives values back
    for name in sorted(before.keys() | now.keys()):
        if name not in before:
            yield f"{name} is new"
        elif name not in now:
            yield f"{name} is gone"
        elif now[name] != before[name]:
            yield f"{name} is {now[name]}, was {before[name]}"


def _check_fingerprint(
    path: Path, found: Mapping[str, str], expected: Mapping[str, str], changes: Mapping[str, tuple[str, ...]]
) -> None:
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    if differing:
        named = [change for name in differing for change in changes.get(name, ())]
        more = f", and {len(named) - MAX_CHANGES_NAMED} more" if len(named) > MAX_CHANGES_NAMED else ""
        what = f": {', '.join(named[:MAX_CHANGES_NAMED])}{more}" if named else ""
        raise CheckpointError(
            f"{path} was written with another {' and another '.join(differing)}{what}",
            expected="the same configuration, training data and trainable weights as when the run began",
            next_step="put back what was changed, or start a new run with `eightgig train`",
        )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged: {what}",
        expected="every file as its manifest lists it",
        next_step=f"delete {path} and resume again: the checkpoint before it is used",
    )


def _sha256_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
