"""Features of images on the disk: many in a file, mapped into memory to be read, whole or not there at all.

A file is named by chance and never changed, so that processes may write at once; what two of them have written twice
is read once. Each image's tensors have a checksum in the file's header.
"""

from __future__ import annotations

import contextlib
import json
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eightgig.core.files import write_bytes

_SUFFIX = ".safetensors"
_BETWEEN = "/"  # of an image's key and the name of one of its tensors


@dataclass(frozen=True)
class StoredImage:
    """What stands for one image in a model's inputs.

    Attributes:
        inputs: its image inputs, features in place of pixels.
        placeholder: the text that the image's placeholder becomes.
    """

    inputs: Mapping[str, Tensor]
    placeholder: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.inputs.values())

    def checksum(self) -> int:
        """CRC-32 of names, dtypes, shapes, values and text."""
        value = zlib.crc32(self.placeholder.encode())
        for name, tensor in sorted(self.inputs.items()):
            value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
            value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
        return value


class FeatureStore:
    """The images whose features lie in `folder`, by key. Picklable: a data worker opens the files anew."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist yet."""
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}

    def look(self, on_damage: Callable[[str], None]) -> None:
        """Learn what lies in the folder. Files that can't be read are removed, and `on_damage` is told."""
        self._file_of, self._open = {}, {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                keys = _metadata(self._reader(path))
            except FileNotFoundError:
                continue  # another process has removed it
            except (ValueError, SafetensorError) as error:
                self._remove(path, str(error), on_damage)
                continue
            self._file_of |= dict.fromkeys(keys, path)

    def verify(self, keys: Iterable[str], on_damage: Callable[[str], None]) -> None:
        """Read those of `keys` that are there to their end; a file in which one has not its checksum is removed."""
        for key in keys:
            path = self._file_of.get(key)
            if path is None:
                continue
            try:
                checksum = json.loads(_metadata(self._reader(path))[key])["checksum"]
                is_sound = self.get(key).checksum() == checksum
            except (ValueError, LookupError, SafetensorError):
                is_sound = False
            if not is_sound:
                self._remove(path, "what it holds has changed", on_damage)

    def get(self, key: str) -> StoredImage:
        """The image of `key`, its tensors mapped from the disk. Raises KeyError where there is none."""
        reader = self._reader(self._file_of[key])
        names = [name for name in reader.keys() if name.partition(_BETWEEN)[0] == key]  # noqa: SIM118  # no mapping
        inputs = {name.partition(_BETWEEN)[2]: reader.get_tensor(name) for name in names}
        return StoredImage(inputs, json.loads(_metadata(reader)[key])["placeholder"])

    def add(self, images: Mapping[str, StoredImage]) -> None:
        """Write `images` as one file, synced and whole.

        Raises:
            DoesNotFit: the disk is full.
            EnvironmentProblem: the folder can't be written to.
        """
        tensors = {
            f"{key}{_BETWEEN}{name}": tensor.contiguous()
            for key, image in images.items()
            for name, tensor in image.inputs.items()
        }
        about = {
            key: json.dumps({"checksum": image.checksum(), "placeholder": image.placeholder})
            for key, image in images.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        write_bytes(path, save(tensors, metadata=about))
        self._file_of |= dict.fromkeys(images, path)

    def _reader(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def _remove(self, path: Path, why: str, on_damage: Callable[[str], None]) -> None:
        on_damage(f"{path} is damaged ({why}): its image features are computed again")
        self._open.pop(path, None)
        self._file_of = {key: file for key, file in self._file_of.items() if file != path}
        path.unlink(missing_ok=True)


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of features below `folder`; 0 where it does not exist."""
    total_bytes = 0
    for path in folder.rglob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            total_bytes += path.stat().st_size
    return total_bytes


def _metadata(reader: Any) -> dict[str, str]:
    metadata: dict[str, str] | None = reader.metadata()
    if metadata is None:
        raise ValueError("its header names no image")
    return metadata
