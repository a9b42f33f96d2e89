"""Folders of images with captions beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from eightgig.data.records import decode_text

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
"""Names that Hugging Face's ImageFolder gives the file with one row an image."""

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp")
)


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of an image folder, None when it has none."""
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


def captioned_images(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Each image at or below `folder`, in the order of the names, with the text of its same-stem `.txt` (or None)."""
    for image in sorted(folder.rglob("*")):
        if image.suffix.lower() not in IMAGE_SUFFIXES or not image.is_file():
            continue
        caption = image.with_suffix(".txt")
        yield image, decode_text(caption.read_bytes(), caption) if caption.is_file() else None
