"""Scenes to count in: dots of two or three colours strewn over the picture, and cards with pips."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from eightgig.demo.palette import COLOURS, pick_colours, tinted
from eightgig.demo.scenes.question import MAX_NUMBER, Question

_CELL_PX = 18
_NUM_CELLS_ACROSS = 7
_CARD_WIDTH_PX = 34
_PIP_CELL_PX = 10


def draw_dots(image: Image.Image, rng: Random) -> list[Question]:
    """Draws 0-20 dots of one colour and a few of one or two others, and returns the questions on their numbers."""
    draw = ImageDraw.Draw(image)
    colours = pick_colours(rng, rng.randint(2, 4))
    most = [MAX_NUMBER, 10, 6, 0]
    counts = [rng.randint(0, most[index]) for index in range(len(colours))]
    cells = rng.sample(range(_NUM_CELLS_ACROSS**2), sum(counts))
    radius_px = rng.randint(3, 6)
    slack_px = _CELL_PX // 2 - radius_px - 1
    shades = [tinted(COLOURS[colour], rng) for colour in colours]
    order = [index for index, count in enumerate(counts) for _ in range(count)]
    for cell, index in zip(cells, order, strict=True):
        x_px = 1 + cell % _NUM_CELLS_ACROSS * _CELL_PX + _CELL_PX // 2 + rng.randint(-slack_px, slack_px)
        y_px = 1 + cell // _NUM_CELLS_ACROSS * _CELL_PX + _CELL_PX // 2 + rng.randint(-slack_px, slack_px)
        box = (x_px - radius_px, y_px - radius_px, x_px + radius_px, y_px + radius_px)
        draw.ellipse(box, fill=shades[index])
    questions = [
        Question("count of dots", f"How many {colour} dots are there?", str(count))
        for colour, count in zip(colours, counts, strict=True)
    ]
    if sum(counts) <= MAX_NUMBER:
        questions.append(Question("count of all dots", "How many dots are there?", str(sum(counts))))
    return questions


def draw_cards(image: Image.Image, rng: Random) -> list[Question]:
    """Draws one to six coloured cards with one to nine pips and returns the questions on their values."""
    draw = ImageDraw.Draw(image)
    num_cards = rng.randint(1, 6)
    questions = []
    for place, colour in zip(rng.sample(range(9), num_cards), pick_colours(rng, num_cards), strict=True):
        left_px, top_px = 2 + place % 3 * 42 + rng.randint(0, 6), 2 + place // 3 * 42 + rng.randint(0, 6)
        box = (left_px, top_px, left_px + _CARD_WIDTH_PX - 1, top_px + _CARD_WIDTH_PX - 1)
        draw.rectangle(box, fill=tinted(COLOURS[colour], rng))
        num_pips = rng.randint(1, 9)
        for pip in rng.sample(range(9), num_pips):
            pip_x_px, pip_y_px = left_px + 4 + pip % 3 * _PIP_CELL_PX, top_px + 4 + pip // 3 * _PIP_CELL_PX
            draw.ellipse((pip_x_px, pip_y_px, pip_x_px + 5, pip_y_px + 5), fill=(252, 252, 252))
        questions.append(Question("value of a card", f"What is the value of the {colour} card?", str(num_pips)))
    questions.append(Question("count of cards", "How many cards are there?", str(num_cards)))
    return questions
