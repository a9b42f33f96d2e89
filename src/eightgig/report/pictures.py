"""Thumbnails that travel inside the HTML file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image, ImageOps

THUMBNAIL_PX = 256
_JPEG_QUALITY = 82


def thumbnail_uri(path: Path) -> str | None:
    """The picture at `path` as a `data:` address of a JPEG of at most THUMBNAIL_PX a side; None if unreadable."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            small = _on_white(upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # moved or damaged since the run: the report says so in the picture's place
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _on_white(image: Image.Image) -> Image.Image:
    """`image` as RGB; what was transparent becomes white, as JPEG knows no transparency."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB")
