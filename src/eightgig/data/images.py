"""From an image file of any mode to upright RGB pixels."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart

MIN_SIDE_PX = 4
"""Thinner images are refused: image processors take a side of 1 or 3 pixels for the colour axis."""

MAX_ASPECT_RATIO = 200
"""Longer images are refused, as Qwen2-VL's smart_resize does (transformers): resizing the short side to a model's size
would blow up the long one to hundreds of megabytes."""

_WHITE = (255, 255, 255, 255)
_ON_ITS_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height

# What Pillow's decoders were seen to raise on damaged files, beside OSError (which UnidentifiedImageError is).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error)


def load_image(part: ImagePart) -> Image.Image:
    """The image as upright RGB (transparency on white, 16 bits scaled to 8). Raises SampleProblem."""
    with _opened(part) as image:
        return _upright_rgb(image)


def check_image(part: ImagePart) -> tuple[int, int]:
    """Width and height in pixels of the upright image, found whole: decoded to its end. Raises SampleProblem.

    JPEG is decoded at an eighth of its size, which reads all of the file and takes about a quarter of the time.
    """
    with _opened(part) as image:
        size = image.size
        image.draft(None, (1, 1))
        _upright_rgb(image)
        return _turned(size, image.getexif())


def image_size(part: ImagePart) -> tuple[int, int]:
    """Width and height in pixels of the upright image, by the file's header: no pixel is decoded. Raises SampleProblem.

    A PNG that says only behind its pixels how it is to be turned counts as upright.
    """
    with _opened(part) as image:
        # Pillow has turned a TIFF's size already, and would decode a PNG to look behind its pixels.
        is_told = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        return _turned(image.size, image.getexif()) if is_told else image.size


@contextlib.contextmanager
def _opened(part: ImagePart) -> Iterator[Image.Image]:
    """The image, its header read and found reasonable; errors inside the block become SampleProblem."""
    try:
        with Image.open(part.path if part.path is not None else io.BytesIO(part.data or b"")) as image:
            _check_size(part, image.size)
            yield image
    except FileNotFoundError as error:
        raise SampleProblem(ProblemCode.MISSING_FILE, f"{part} does not exist") from error
    except UnidentifiedImageError as error:
        raise SampleProblem(ProblemCode.NOT_AN_IMAGE, f"{part} is no image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise SampleProblem(ProblemCode.TOO_MANY_PIXELS, f"{part}: {error}") from error
    except _DECODE_ERRORS as error:
        raise SampleProblem(ProblemCode.BROKEN_IMAGE, f"{part} can't be decoded: {error}") from error


def _check_size(part: ImagePart, size: tuple[int, int]) -> None:
    width_px, height_px = size
    limit_px = Image.MAX_IMAGE_PIXELS
    if limit_px is not None and width_px * height_px > limit_px:
        raise SampleProblem(
            ProblemCode.TOO_MANY_PIXELS, f"{part} has {width_px} × {height_px} pixels, more than {limit_px:,}"
        )
    short_px, long_px = sorted(size)
    if short_px < MIN_SIDE_PX or long_px > MAX_ASPECT_RATIO * short_px:
        raise SampleProblem(
            ProblemCode.UNUSABLE_SHAPE,
            f"{part} has {width_px} × {height_px} pixels; at least {MIN_SIDE_PX} a side and a ratio of at most "
            f"{MAX_ASPECT_RATIO} are needed",
        )


def _turned(size: tuple[int, int], exif: Image.Exif) -> tuple[int, int]:
    """`size` as it is once the image is upright."""
    return size[::-1] if exif.get(ExifTags.Base.Orientation) in _ON_ITS_SIDE else size


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        return _from_16_bit(upright)
    if upright.mode == "F":
        raise SampleProblem(
            ProblemCode.UNSUPPORTED_MODE, "floating-point pixels have no set range: save the image with 8 or 16 bits"
        )
    if upright.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in upright.info:
        coloured = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, _WHITE), coloured).convert("RGB")
    return upright.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey values 0 … 65535 as RGB 0 … 255; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image, dtype=np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise SampleProblem(
            ProblemCode.UNSUPPORTED_MODE,
            f"grey values from {values.min()} to {values.max()}: save the image with 8 or 16 bits",
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
