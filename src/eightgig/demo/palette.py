"""Named colours, light background tints and the drawing of digits that every rendered picture of the demo shares."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Rgb = tuple[int, int, int]

IMAGE_SIZE_PX = 128
"""Side of every rendered picture: 8 x 8 patches of 16 px are the embedded model's 64 image tokens."""

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 20),
    "yellow": (232, 208, 30),
    "green": (48, 150, 60),
    "cyan": (50, 196, 206),
    "blue": (40, 84, 204),
    "purple": (128, 56, 176),
    "pink": (240, 130, 180),
    "brown": (122, 76, 38),
    "black": (30, 30, 34),
}

# Three columns by five rows a digit, one bit a pixel: drawn by hand because a font's pixels change between releases of
# PIL, and the demo's pictures must not.
_DIGIT_ROWS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}
DIGIT_WIDTH_PX = 3
DIGIT_HEIGHT_PX = 5


def tinted(rgb: Rgb, rng: Random, spread: int = 14) -> Rgb:
    """`rgb` with each channel moved by at most `spread`, so that no colour name means one exact value."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in rgb)
    return red, green, blue


def light_tint(rng: Random, lowest: int = 196) -> Rgb:
    """A background colour whose channels are all at least `lowest`: every named colour stands out from it."""
    base = rng.randint(lowest + 14, 255)
    red, green, blue = (min(255, max(lowest, base + rng.randint(-16, 16))) for _ in range(3))
    return red, green, blue


def pick_colours(rng: Random, num_colours: int) -> list[str]:
    """`num_colours` different colour names in random order."""
    return rng.sample(list(COLOURS), num_colours)


def draw_number(draw: ImageDraw, number: int, right_px: int, centre_y_px: int, fill: Rgb) -> None:
    """Draws `number` with its right edge at `right_px`, centred on the line `centre_y_px`."""
    text = str(number)
    left_px = right_px - len(text) * (DIGIT_WIDTH_PX + 1) + 2
    top_px = centre_y_px - DIGIT_HEIGHT_PX // 2
    for index, digit in enumerate(text):
        for row, bits in enumerate(_DIGIT_ROWS[digit]):
            for column in range(DIGIT_WIDTH_PX):
                if bits >> (DIGIT_WIDTH_PX - 1 - column) & 1:
                    draw.point((left_px + index * (DIGIT_WIDTH_PX + 1) + column, top_px + row), fill=fill)
