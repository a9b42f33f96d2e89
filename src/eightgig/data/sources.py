"""From a path the user gave to samples: a data file, a folder of data files, or a folder of captioned images."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.core.errors import DataError
from eightgig.core.logging import get_logger
from eightgig.data.folder import METADATA_NAMES, captioned_images, metadata_file
from eightgig.data.formats import FORMATS, detect_format, flat
from eightgig.data.formats.record import RecordFormat, shown
from eightgig.data.quarantine import ProblemCode, Quarantine, QuarantineRecord, SampleProblem
from eightgig.data.records import Record, encoding_error, read_records
from eightgig.data.sample import Message, Sample, SourceRef, images_of

DATA_SUFFIXES = (".json", ".jsonl")
MAX_ID_CHARACTERS = 200  # an id is a name in messages and file names, not a text

logger = get_logger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """What was read from one file (or from one folder of captioned images).

    Attributes:
        path: the file or folder.
        shape: name of the shape its records have.
        sha256: of the file's content; for a captioned folder, of its image names and captions.
    """

    path: Path
    shape: str
    sha256: str
    num_records: int
    num_bad: int


@dataclass(frozen=True)
class SampleSet:
    """All samples that could be read, in the order of the files.

    Attributes:
        samples: what can be used, as far as reading the data file tells.
        bad: what was quarantined while reading.
        manifest: one entry a file read; equal manifests mean equal data files.
    """

    samples: tuple[Sample, ...]
    bad: tuple[QuarantineRecord, ...]
    manifest: tuple[SourceFile, ...]


def load_samples(path: Path, image_root: Path | None, quarantine: Quarantine) -> SampleSet:
    """The samples of `path`: a JSON or JSONL file, or a folder of data files or of captioned images.

    Relative image paths lie below `image_root`, or below the data file's own folder when it is None. An `image_root` is
    a fence as well: no image outside of it is taken, be it named by an absolute path or by a link that leads out.
    No image is opened here. Records that can't be used go to `quarantine`.

    Raises:
        DataError: there is no such path or image root, nothing in it, a file can't be read or has no known shape.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist{_nearest(path)}",
            expected="a .json or .jsonl file, or a folder of data files or captioned images",
            next_step="check the path; `data.data_path` is taken from the folder you are in",
        )
    if image_root is not None and not image_root.is_dir():
        raise DataError(
            f"there is no folder {image_root}",
            expected="the folder that relative image paths start from, as data.image_root",
            next_step="correct --image-root, or leave it out where the images lie beside the data file",
        )
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for without end, a device never ends
        raise DataError(
            f"{path} is neither a file nor a folder",
            expected="a .json or .jsonl file, or a folder of data files or captioned images",
            next_step="write what comes from it to a file first: it is read more than once",
        )
    num_before = len(quarantine)
    reader = _Reader(image_root, quarantine)
    if path.is_file():
        reader.read_file(path)
    else:
        reader.read_folder(path)
    return SampleSet(tuple(reader.samples), quarantine.records[num_before:], tuple(reader.manifest))


class _Reader:
    """Gathers samples over the files of one data set."""

    def __init__(self, image_root: Path | None, quarantine: Quarantine) -> None:
        self._image_root = image_root
        self._quarantine = quarantine
        self.samples: list[Sample] = []
        self.manifest: list[SourceFile] = []

    def read_folder(self, folder: Path) -> None:
        """Read a metadata file if there is one, else the data files, else the images with their captions."""
        metadata = metadata_file(folder)
        if metadata is not None:
            self.read_file(metadata, (flat.FORMAT,))
            return
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in DATA_SUFFIXES and file.is_file())
        for file in files:
            self.read_file(file)
        if not files:
            self._read_captioned(folder)

    def read_file(self, path: Path, shapes: Sequence[RecordFormat] = FORMATS) -> None:
        """Read one file whose records have the one of `shapes` that its first fitting record shows."""
        records, digest = _read(path)
        shape = _file_format(path, records, shapes)
        root = self._image_root if self._image_root is not None else path.parent
        num_bad_before = len(self._quarantine)
        for record in records:
            source = SourceRef(path, record.line)
            sample_id = _sample_id(record, f"{path.name}:{record.line}")
            try:
                messages = _parse(record, shape, root)
                if self._image_root is not None:
                    _refuse_images_outside(messages, self._image_root)
                self.samples.append(Sample(sample_id, messages, source))
            except SampleProblem as problem:
                self._quarantine.add(source, sample_id, problem)
        num_bad = len(self._quarantine) - num_bad_before
        self.manifest.append(SourceFile(path, shape.name, digest, len(records), num_bad))
        logger.info("%s: %d records, %s shape, %d bad", path, len(records), shape.name, num_bad)

    def _read_captioned(self, folder: Path) -> None:
        digest = hashlib.sha256()
        num_bad_before = len(self._quarantine)
        num_images = 0
        for image, caption in captioned_images(folder):
            num_images += 1
            source, sample_id = SourceRef(image, 0), image.relative_to(folder).as_posix()
            # surrogateescape: a file's name may be no UTF-8, and is then told apart all the same
            digest.update(f"{sample_id}\0{caption}\0".encode(errors="surrogateescape"))
            try:
                if isinstance(caption, SampleProblem):
                    raise caption
                messages = flat.FORMAT.parse({"image": str(image.absolute()), "caption": caption}, folder)
            except SampleProblem as problem:
                self._quarantine.add(source, sample_id, problem)
                continue
            self.samples.append(Sample(sample_id, messages, source))
        num_bad = len(self._quarantine) - num_bad_before
        if num_images == num_bad:
            raise DataError(
                f"{folder} holds {num_images} images and no caption for any of them, and no data file"
                if num_images
                else f"{folder} holds neither data files nor images",
                expected=f"images with .txt files of the same name, or {' or '.join(METADATA_NAMES)}, or .json/.jsonl",
                next_step="add the captions, or give the path of the data file itself",
            )
        self.manifest.append(SourceFile(folder, "captioned images", digest.hexdigest(), num_images, num_bad))


def _parse(record: Record, shape: RecordFormat, root: Path) -> tuple[Message, ...]:
    """The conversation of one record of a file whose records have `shape`. Raises SampleProblem."""
    if isinstance(record.value, SampleProblem):
        raise record.value
    if not shape.matches(record.value):
        raise SampleProblem(
            ProblemCode.WRONG_SHAPE,
            f"the file has the {shape.name} shape ({shape.keys}), but this record has the keys {_keys(record.value)}",
        )
    return shape.parse(record.value, root)


def _sample_id(record: Record, otherwise: str) -> str:
    """The record's own id where it is a name or a number, else `otherwise`."""
    given = record.value.get("id") if isinstance(record.value, dict) else None
    is_name = isinstance(given, str | int | float)
    return str(given)[:MAX_ID_CHARACTERS] if is_name else otherwise


def _refuse_images_outside(messages: Sequence[Message], image_root: Path) -> None:
    """Raise SampleProblem for an image file that does not lie below `image_root`, links followed."""
    root = os.path.realpath(image_root)
    for part in images_of(messages):
        if part.path is None:
            continue
        real = os.path.realpath(part.path)
        if os.path.commonpath([root, real]) != root:
            leads = f" (a link to {real})" if os.path.abspath(part.path) != real else ""
            raise SampleProblem(
                ProblemCode.PATH_OUTSIDE_ROOT,
                f"image {part.path}{leads} lies outside of data.image_root = {image_root}: "
                "set that to a folder above it, or leave it out",
            )


def _file_format(path: Path, records: list[Record], shapes: Sequence[RecordFormat]) -> RecordFormat:
    """The shape of the first record that has one of `shapes`. Raises DataError."""
    objects = [record.value for record in records if isinstance(record.value, dict)]
    found = next((shape for item in objects if (shape := detect_format(item, shapes)) is not None), None)
    if found is not None:
        return found
    known = "; ".join(f"{shape.name}: {shape.keys}" for shape in shapes)
    other_encoding = encoding_error(path, records)
    if not objects and other_encoding is not None:
        raise other_encoding
    if not objects:
        raise DataError(
            f"{path} holds no record that could be read",
            expected=f"a JSON list or one JSON object a line, in one of the shapes {known}",
            next_step="look into the file; docs/guides/data-formats.md shows each shape",
        )
    raise DataError(
        f"{path} has no known shape: its first record has the keys {_keys(objects[0])}",
        expected=f"one of {known}",
        next_step="rename the keys to those of a known shape; docs/guides/data-formats.md shows each",
    )


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(shown(key) for key in list(record)[:12]) or "(none)"


def _read(path: Path) -> tuple[list[Record], str]:
    """The records of `path` and the SHA-256 of its content. Raises DataError."""
    try:
        records = read_records(path)
        with path.open("rb") as stream:
            return records, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror}",
            expected="a file that you may read",
            next_step="check the file's permissions and the disk",
        ) from error


def _nearest(path: Path) -> str:
    """A hint at the file that was probably meant."""
    if not path.parent.is_dir():
        return f", and neither does its folder {path.parent}"
    names: Sequence[str] = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=1)
    return f"; there is {path.parent / names[0]}" if names else ""
