"""From an image file of any mode to upright RGB pixels."""

from __future__ import annotations

import contextlib
import functools
import io
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.sample import ImagePart

MIN_SIDE_PX = 4
"""Thinner images are refused: image processors take a side of 1 or 3 pixels for the colour axis."""

MAX_ASPECT_RATIO = 200
"""Longer images are refused, as Qwen2-VL's smart_resize does (transformers): resizing the short side to a model's size
would blow up the long one to hundreds of megabytes."""

MAX_FILE_BYTES = 384 << 20
"""Larger files are not opened: a picture of as many pixels as Pillow takes has 341 MiB uncompressed with transparency,
and what lies between its pixels (a colour profile, texts) is read whole."""

LARGE_PX = 16_000_000
"""Images of more pixels are checked one at a time: a decoded pixel takes some ten bytes, in each checking thread."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is read, by Pillow's names. Not all it knows: an EPS file is a program, which it has Ghostscript run."""

_WHITE = (255, 255, 255, 255)
_ON_ITS_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height
_TO_8_BIT = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)

# Pillow's decoders raise whatever their arithmetic on damaged numbers comes to; these ancestors hold all that was seen,
# among them UnidentifiedImageError (an OSError), OverflowError, IndexError, KeyError and EOFError.
_DECODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_one_large_image = threading.Lock()


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
        is_large = image.width * image.height > LARGE_PX
        with _one_large_image if is_large else contextlib.nullcontext():
            image.load()  # a PNG may say only behind its pixels how it is to be turned
            upright_size = _turned(size, image.getexif())
            _upright_rgb(image)
        return upright_size


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
        if part.path is not None:
            _check_file(part.path)
        with Image.open(
            part.path if part.path is not None else io.BytesIO(part.data or b""), formats=_known()
        ) as image:
            _check_size(part, image.size)
            yield image
    except FileNotFoundError as error:
        raise SampleProblem(ProblemCode.MISSING_FILE, f"{part} does not exist") from error
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise SampleProblem(ProblemCode.NOT_AN_IMAGE, f"{part} is no image that Pillow can read as {known}") from error
    except Image.DecompressionBombError as error:
        raise SampleProblem(ProblemCode.TOO_MANY_PIXELS, f"{part}: {error}") from error
    except _DECODE_ERRORS as error:
        raise SampleProblem(ProblemCode.BROKEN_IMAGE, f"{part} can't be decoded: {error}") from error


@functools.cache
def _known() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_file(path: Path) -> None:
    """Refuse what would be waited for without end (a pipe), and what is too large to be read. Raises SampleProblem."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise SampleProblem(ProblemCode.NOT_AN_IMAGE, f"{path} is no file but a pipe or a device")
    if status.st_size > MAX_FILE_BYTES:
        reason = f"{path} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}"
        raise SampleProblem(ProblemCode.TOO_LARGE, reason)


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
    upright = image
    ImageOps.exif_transpose(upright, in_place=True)  # not a copy of what may be hundreds of megabytes
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
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise SampleProblem(
            ProblemCode.UNSUPPORTED_MODE,
            f"grey values from {values.min()} to {values.max()}: save the image with 8 or 16 bits",
        )
    return Image.fromarray(_TO_8_BIT[values]).convert("RGB")
