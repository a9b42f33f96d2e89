"""Scenes of bars standing on a floor or hanging free, of rods lying, and of balls over a floor: lengths and places."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from eightgig.demo.palette import COLOURS, IMAGE_SIZE_PX, pick_colours, tinted
from eightgig.demo.scenes.question import MAX_NUMBER, SMALL_UNIT_PX, Question, measured, yes_or_no

_MIN_LENGTH_PX = 3
_CLEAR_DIFFERENCE_PX = 3


@dataclass(frozen=True)
class Rod:
    """A rectangle along one axis: pixels [start, end) along it and [side, side + thickness) across it.

    For a standing bar the axis points up and starts at the lower edge of the picture.
    """

    colour: str
    start_px: int
    end_px: int
    side_px: int
    thickness_px: int

    @property
    def length_px(self) -> int:
        """Extent along the axis, in pixels."""
        return self.end_px - self.start_px


def draw_bars(image: Image.Image, rng: Random) -> list[Question]:
    """Draws one to six standing bars, some with balls between them, and returns all questions on them."""
    floor_px = _pick_floor(rng) if rng.random() < 0.75 else None
    rods = _place_rods(rng, floor_px)
    draw = ImageDraw.Draw(image)
    num_balls = rng.randint(1, len(rods)) if floor_px is not None and rng.random() < 0.2 else 0
    if floor_px is not None and (num_balls or rng.random() < 0.7):
        _draw_floor(draw, rng, floor_px)
    balls, bars = rods[:num_balls], rods[num_balls:]
    for rod in bars:
        top_px = IMAGE_SIZE_PX - rod.end_px
        box = (rod.side_px, top_px, rod.side_px + rod.thickness_px - 1, IMAGE_SIZE_PX - rod.start_px - 1)
        draw.rectangle(box, fill=tinted(COLOURS[rod.colour], rng))
    questions = []
    for ball in balls:
        radius_px = 3
        centre_x_px, centre_y_px = ball.side_px + ball.thickness_px // 2, IMAGE_SIZE_PX - ball.end_px
        box = (centre_x_px - radius_px, centre_y_px - radius_px, centre_x_px + radius_px, centre_y_px + radius_px)
        draw.ellipse(box, fill=tinted(COLOURS[ball.colour], rng))
        text = f"How high is the {ball.colour} ball above the floor?"
        questions += measured("height of a ball", text, ball.length_px)
    return questions + _ask_bars(bars, rng)


def draw_rods(image: Image.Image, rng: Random) -> list[Question]:
    """Draws one to six lying rods and returns all questions on them."""
    shared_start_px = rng.randint(0, 40) if rng.random() < 0.3 else None
    rods = _place_rods(rng, shared_start_px)
    draw = ImageDraw.Draw(image)
    for rod in rods:
        box = (rod.start_px, rod.side_px, rod.end_px - 1, rod.side_px + rod.thickness_px - 1)
        draw.rectangle(box, fill=tinted(COLOURS[rod.colour], rng))
    return _ask_rods(rods, rng)


def _pick_floor(rng: Random) -> int:
    """Height of the floor over the lower edge: mostly low, so that long bars fit, at times in the middle."""
    return rng.randint(1, 26) if rng.random() < 0.75 else rng.randint(1, 70)


def _draw_floor(draw: ImageDraw.ImageDraw, rng: Random, floor_px: int) -> None:
    """A dark line or a darker band: told apart from any background, because balls are measured from it."""
    floor_y_px = IMAGE_SIZE_PX - floor_px
    level = rng.randint(20, 80)
    if floor_px < 2 or rng.random() < 0.5:
        draw.line((0, floor_y_px, IMAGE_SIZE_PX, floor_y_px), fill=(level, level, level))
    else:
        draw.rectangle((0, floor_y_px, IMAGE_SIZE_PX, IMAGE_SIZE_PX), fill=(level + 20, level + 20, level + 10))


def _place_rods(rng: Random, shared_start_px: int | None) -> list[Rod]:
    """One to six rods of different colours side by side, left to right, in slots; some touch their neighbours."""
    num_rods = rng.randint(1, 6)
    span_px = rng.randint(max(40, num_rods * 10), IMAGE_SIZE_PX - 4)
    first_px = rng.randint(1, IMAGE_SIZE_PX - span_px - 1)
    slot_px = span_px // num_rods
    touching = rng.random() < 0.2
    rods = []
    for index, colour in enumerate(pick_colours(rng, num_rods)):
        thickness_px = slot_px if touching else rng.randint(min(4, slot_px - 2), max(4, min(30, slot_px - 2)))
        side_px = first_px + index * slot_px + rng.randint(0, slot_px - thickness_px)
        start_px, end_px = _pick_extent(rng, shared_start_px)
        rods.append(Rod(colour, start_px, end_px, side_px, thickness_px))
    return rods


def _pick_extent(rng: Random, shared_start_px: int | None) -> tuple[int, int]:
    if shared_start_px is not None:
        longest_px = min(IMAGE_SIZE_PX - 2 - shared_start_px, 6 * MAX_NUMBER + 2)
        return shared_start_px, shared_start_px + rng.randint(_MIN_LENGTH_PX, longest_px)
    length_px = rng.randint(_MIN_LENGTH_PX, IMAGE_SIZE_PX - 6)
    start_px = rng.randint(1, IMAGE_SIZE_PX - 2 - length_px)
    return start_px, start_px + length_px


def _ask_bars(bars: list[Rod], rng: Random) -> list[Question]:
    questions = []
    for bar in bars:
        name = f"the {bar.colour} bar"
        text = rng.choice((f"How tall is {name}?", f"What is the height of {name}?"))
        questions += measured("height", text, bar.length_px)
        text = f"What is the height of {name} in small units?"
        questions += measured("height in small units", text, bar.length_px, SMALL_UNIT_PX)
        questions += measured("place of a top", f"Where is the top of {name}?", bar.end_px)
    return questions + _ask_order(bars, rng, "bar", "tall")


def _ask_rods(rods: list[Rod], rng: Random) -> list[Question]:
    questions = []
    for rod in rods:
        name = f"the {rod.colour} rod"
        text = rng.choice((f"How long is {name}?", f"What is the length of {name}?"))
        questions += measured("length", text, rod.length_px)
        text = f"What is the length of {name} in small units?"
        questions += measured("length in small units", text, rod.length_px, SMALL_UNIT_PX)
        questions += measured("place of an end", f"Where does {name} end?", rod.end_px)
        questions += measured("place of a start", f"Where does {name} start?", rod.start_px)
    return questions + _ask_order(rods, rng, "rod", "long")


def _ask_order(rods: list[Rod], rng: Random, noun: str, adjective: str) -> list[Question]:
    """Counts, extremes, comparisons and differences: only where the lengths differ clearly."""
    questions = [Question(f"count of {noun}s", f"How many {noun}s are there?", str(len(rods)))]
    if len(rods) < 2:
        return questions
    ordered = sorted(rods, key=lambda rod: rod.length_px)
    if ordered[-1].length_px - ordered[-2].length_px >= _CLEAR_DIFFERENCE_PX:
        questions.append(Question(f"most {adjective}", f"Which {noun} is the {adjective}est?", ordered[-1].colour))
    if ordered[1].length_px - ordered[0].length_px >= _CLEAR_DIFFERENCE_PX:
        questions.append(Question(f"least {adjective}", f"Which {noun} is the shortest?", ordered[0].colour))
    one, other = rng.sample(rods, 2)
    if abs(one.length_px - other.length_px) >= _CLEAR_DIFFERENCE_PX:
        text = f"Is the {one.colour} {noun} {adjective}er than the {other.colour} {noun}?"
        questions.append(yes_or_no(f"{adjective}er", text, one.length_px > other.length_px))
    if noun == "bar":
        questions.append(Question("first bar", "What color is the bar on the left?", rods[0].colour))
        questions.append(Question("last bar", "What color is the bar on the right?", rods[-1].colour))
    return questions
