"""Backgrounds of the scenes: tints, gradients, bands, panels, thin lines and specks, none of which is ever asked about.

They are there so that what the vision tower learns of edges and lengths survives on pictures of another kind.
"""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from eightgig.demo.palette import IMAGE_SIZE_PX, Rgb, light_tint


def paint_background(rng: Random) -> Image.Image:
    """A new RGB picture of `IMAGE_SIZE_PX` with a light background and random distractors."""
    image = Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), light_tint(rng))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.25:
        _draw_bands(draw, rng)
    if rng.random() < 0.4:
        _draw_panel(draw, rng)
    if rng.random() < 0.6:
        _draw_thin_lines(draw, rng)
    if rng.random() < 0.4:
        _draw_specks(draw, rng)
    return image


def _grey(rng: Random) -> Rgb:
    level = rng.randint(120, 220)
    return (level, level, min(255, level + rng.randint(0, 12)))


def _draw_bands(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for _ in range(rng.randint(1, 3)):
        start_px = rng.randint(0, IMAGE_SIZE_PX - 8)
        end_px = min(IMAGE_SIZE_PX, start_px + rng.randint(4, 60))
        box = (0, start_px, IMAGE_SIZE_PX, end_px) if rng.random() < 0.5 else (start_px, 0, end_px, IMAGE_SIZE_PX)
        draw.rectangle(box, fill=light_tint(rng))


def _draw_panel(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    left_px, top_px = rng.randint(0, 40), rng.randint(0, 40)
    box = (left_px, top_px, rng.randint(left_px + 40, IMAGE_SIZE_PX), rng.randint(top_px + 40, IMAGE_SIZE_PX))
    draw.rectangle(box, fill=light_tint(rng, lowest=216), outline=_grey(rng) if rng.random() < 0.4 else None)


def _draw_thin_lines(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for _ in range(rng.randint(1, 5)):
        place_px, colour = rng.randint(0, IMAGE_SIZE_PX - 1), _grey(rng)
        start_px, end_px = sorted((rng.randint(-40, IMAGE_SIZE_PX), rng.randint(0, IMAGE_SIZE_PX + 40)))
        direction = rng.random()
        if direction < 0.55:
            draw.line((start_px, place_px, end_px, place_px), fill=colour)
        elif direction < 0.9:
            draw.line((place_px, start_px, place_px, end_px), fill=colour)
        else:
            draw.line((start_px, place_px, end_px, rng.randint(0, IMAGE_SIZE_PX)), fill=colour)


def _draw_specks(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for _ in range(rng.randint(2, 12)):
        left_px, top_px = rng.randint(0, IMAGE_SIZE_PX), rng.randint(0, IMAGE_SIZE_PX)
        box = (left_px, top_px, left_px + rng.randint(0, 2), top_px + rng.randint(0, 4))
        draw.rectangle(box, fill=_grey(rng))
