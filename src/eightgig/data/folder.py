"""Folders of images with captions beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.records import decode_utf8

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
"""Names that Hugging Face's ImageFolder gives the file with one row an image."""

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of an image folder, None when it has none."""
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


MAX_CAPTION_BYTES = 1 << 20


def captioned_images(folder: Path) -> Iterator[tuple[Path, str | SampleProblem]]:
    """Each image at or below `folder`, in the order of the names, with its same-stem `.txt`, or why there is none."""
    for image in sorted(folder.rglob("*")):
        if image.suffix.lower() not in IMAGE_SUFFIXES or not image.is_file():
            continue
        try:
            yield image, _caption(image.with_suffix(".txt"))
        except SampleProblem as problem:
            yield image, problem


def _caption(path: Path) -> str:
    """The text in `path`. Raises SampleProblem."""
    if not path.is_file():
        raise SampleProblem(ProblemCode.MISSING_CAPTION, f"no {path.name} beside the image")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise SampleProblem(ProblemCode.MISSING_CAPTION, f"{path.name} can't be read: {error.strerror}") from error
    if len(content) > MAX_CAPTION_BYTES:
        reason = f"{path.name} holds more than {MAX_CAPTION_BYTES:,} bytes"
        raise SampleProblem(ProblemCode.TOO_LARGE, reason)
    return decode_utf8(content, path.name)
