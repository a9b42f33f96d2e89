"""An independent reading of rendered pictures: from the pixels and the palette alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eightgig.demo.palette import COLOURS

TINT_SPREAD = 14


def mask_of(image: Image.Image, colour: str) -> NDArray[np.bool_]:
    """Where the picture has `colour`, within its tints."""
    pixels = np.asarray(image).astype(int)
    return (np.abs(pixels - np.array(COLOURS[colour])) <= TINT_SPREAD).all(axis=2)


def rows_and_columns(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """First row, last row, first column and last column with a pixel of `mask`."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def num_components(mask: NDArray[np.bool_]) -> int:
    """Number of groups of pixels that touch by a side or a corner."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    num_groups = 0
    while left:
        num_groups += 1
        front = [left.pop()]
        while front:
            row, column = front.pop()
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            front += near
    return num_groups
