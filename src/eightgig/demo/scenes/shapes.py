"""Scenes of one to six objects with a shape, a colour, a size and a place: what, where, how many, and captions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from eightgig.demo.palette import COLOURS, IMAGE_SIZE_PX, Rgb, pick_colours, tinted
from eightgig.demo.scenes.question import Question, measured, yes_or_no

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
_CELL_PX = 42
_CLEAR_DISTANCE_PX = 12


@dataclass(frozen=True)
class Thing:
    """An object of one colour, centred at (`x_px`, `y_px`) from the upper left corner."""

    colour: str
    shape: str
    is_large: bool
    x_px: int
    y_px: int

    @property
    def size(self) -> str:
        """The word for its size."""
        return "large" if self.is_large else "small"

    @property
    def name(self) -> str:
        """Its colour and shape, as questions name it."""
        return f"{self.colour} {self.shape}"


def draw_shapes(image: Image.Image, rng: Random) -> list[Question]:
    """Draws one to six objects of different colours and returns all questions on them."""
    num_things = rng.randint(1, 6)
    cells = rng.sample(range(9), num_things)
    things = []
    draw = ImageDraw.Draw(image)
    for cell, colour in zip(cells, pick_colours(rng, num_things), strict=True):
        is_large = rng.random() < 0.5
        radius_px = rng.randint(14, 17) if is_large else rng.randint(6, 9)
        slack_px = _CELL_PX // 2 - radius_px - 1
        x_px = 1 + cell % 3 * _CELL_PX + _CELL_PX // 2 + rng.randint(-slack_px, slack_px)
        y_px = 1 + cell // 3 * _CELL_PX + _CELL_PX // 2 + rng.randint(-slack_px, slack_px)
        thing = Thing(colour, rng.choice(SHAPES), is_large, x_px, y_px)
        _draw_thing(draw, thing, radius_px, tinted(COLOURS[colour], rng))
        things.append(thing)
    questions = [question for thing in things for question in _ask_thing(thing, things)]
    return questions + _ask_counts(things, rng) + _ask_relations(things, rng) + _ask_caption(things)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, radius_px: int, fill: Rgb) -> None:
    x_px, y_px = thing.x_px, thing.y_px
    box = (x_px - radius_px, y_px - radius_px, x_px + radius_px, y_px + radius_px)
    third_px = max(2, radius_px // 3)
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill)
    elif thing.shape == "triangle":
        draw.polygon(((x_px, box[1]), (box[0], box[3]), (box[2], box[3])), fill=fill)
    elif thing.shape == "diamond":
        draw.polygon(((x_px, box[1]), (box[2], y_px), (x_px, box[3]), (box[0], y_px)), fill=fill)
    elif thing.shape == "cross":
        draw.rectangle((x_px - third_px, box[1], x_px + third_px, box[3]), fill=fill)
        draw.rectangle((box[0], y_px - third_px, box[2], y_px + third_px), fill=fill)
    else:
        draw.ellipse(box, outline=fill, width=third_px)


def _ask_thing(thing: Thing, things: list[Thing]) -> list[Question]:
    name = f"the {thing.name}"
    questions = [
        Question("shape", f"What shape is the {thing.colour} object?", thing.shape),
        Question("size", f"What size is {name}?", thing.size),
        *measured("place across", f"How far is {name} from the left?", thing.x_px),
        *measured("place up", f"How high is {name}?", IMAGE_SIZE_PX - thing.y_px),
    ]
    if sum(other.shape == thing.shape for other in things) == 1:
        questions.append(Question("color", f"What color is the {thing.shape}?", thing.colour))
    return questions


def _ask_counts(things: list[Thing], rng: Random) -> list[Question]:
    shape = rng.choice(SHAPES)
    num_shape = sum(thing.shape == shape for thing in things)
    shown = rng.choice(things)
    asked = shown.name if rng.random() < 0.5 else f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    return [
        Question("count of objects", "How many objects are there?", str(len(things))),
        Question("count of a shape", f"How many {shape}s are there?".replace("crosss", "crosses"), str(num_shape)),
        yes_or_no("presence", f"Is there a {asked}?".replace("a orange", "an orange"), _is_shown(asked, things)),
    ]


def _is_shown(name: str, things: list[Thing]) -> bool:
    return any(thing.name == name for thing in things)


def _ask_relations(things: list[Thing], rng: Random) -> list[Question]:
    if len(things) < 2:
        return []
    one, other = rng.sample(things, 2)
    questions = []
    if abs(one.x_px - other.x_px) >= _CLEAR_DISTANCE_PX:
        side, holds = rng.choice((("left", one.x_px < other.x_px), ("right", one.x_px > other.x_px)))
        questions.append(yes_or_no("left or right", f"Is the {one.name} {side} of the {other.name}?", holds))
    if abs(one.y_px - other.y_px) >= _CLEAR_DISTANCE_PX:
        side, holds = rng.choice((("above", one.y_px < other.y_px), ("below", one.y_px > other.y_px)))
        questions.append(yes_or_no("above or below", f"Is the {one.name} {side} the {other.name}?", holds))
    return questions


def _ask_caption(things: list[Thing]) -> list[Question]:
    """A caption from left to right, where at most three objects make that order plain."""
    ordered = sorted(things, key=lambda thing: thing.x_px)
    gaps_px = [right.x_px - left.x_px for left, right in itertools.pairwise(ordered)]
    if len(things) > 3 or any(gap_px < _CLEAR_DISTANCE_PX for gap_px in gaps_px):
        return []
    caption = ", ".join(f"{thing.size} {thing.name}" for thing in ordered)
    return [Question("caption", "Describe the picture from left to right.", caption)]
