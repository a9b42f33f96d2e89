"""Thumbnails: small, upright, on white, and None where there is nothing to show."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from eightgig.report.pictures import thumbnail_uri


def decode(uri: str | None) -> Image.Image:
    """The picture in a data address."""
    assert uri is not None
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK", "I;16", "1"])
def test_every_kind_of_picture_becomes_a_small_jpeg(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    Image.new(mode, (513, 100)).save(path)
    with decode(thumbnail_uri(path)) as thumbnail:
        assert thumbnail.format == "JPEG"
        assert thumbnail.size == (256, 50)


def test_a_small_picture_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("RGB", (31, 17)).save(tmp_path / "a.png")
    assert decode(thumbnail_uri(tmp_path / "a.png")).size == (31, 17)


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert decode(thumbnail_uri(tmp_path / "a.png")).getpixel((20, 20)) == (255, 255, 255)


def test_the_camera_s_rotation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(thumbnail_uri(tmp_path / "a.jpg")).size == (20, 40)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_what_is_no_picture_gives_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    assert thumbnail_uri(path) is None
    assert thumbnail_uri(tmp_path) is None
