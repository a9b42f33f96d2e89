"""Random scenes with plain questions: what the embedded model was pretrained on. No chart and no gauge among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from eightgig.demo.scenes.background import paint_background
from eightgig.demo.scenes.dots import draw_cards, draw_dots
from eightgig.demo.scenes.question import LARGE_UNIT_PX, MAX_NUMBER, SMALL_UNIT_PX, Question, whole_units
from eightgig.demo.scenes.rods import draw_bars, draw_rods
from eightgig.demo.scenes.shapes import draw_shapes

__all__ = [
    "LARGE_UNIT_PX",
    "MAX_NUMBER",
    "SMALL_UNIT_PX",
    "Question",
    "Scene",
    "render_scene",
    "whole_units",
]

_Drawer = Callable[[Image.Image, Random], list[Question]]
_DRAWERS: tuple[_Drawer, ...] = (draw_bars, draw_rods, draw_shapes, draw_dots, draw_cards)
# Bars and rods get the most pictures: reading a length to a few pixels is the slowest thing to learn.
_WEIGHTS = (36, 22, 22, 14, 6)


@dataclass(frozen=True)
class Scene:
    """An RGB picture of 128 x 128 px and the questions asked on it, in random order."""

    image: Image.Image
    questions: tuple[Question, ...]


def render_scene(seed: int, *, max_num_questions: int = 6) -> Scene:
    """The scene of `seed`, the same on every machine, with at most `max_num_questions` of its questions."""
    rng = Random(seed)
    image = paint_background(rng)
    (drawer,) = rng.choices(_DRAWERS, weights=_WEIGHTS)
    questions = drawer(image, rng)
    return Scene(image, tuple(rng.sample(questions, min(max_num_questions, len(questions)))))
