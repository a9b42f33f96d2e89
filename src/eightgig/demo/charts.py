"""The demo's task: reading the values of coloured bars off a chart. The embedded model has never seen a chart.

A chart has one value axis from 0 to 20 with ticks, numbers and gridlines. Its place in the picture, the number, widths,
order and colours of its bars, the spacing and all tints vary. The scenes of pretraining count lengths in units of 4 and
6 px, charts in units of 5 px: before training the model answers with a number, and nearly always a wrong one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image, ImageDraw

from eightgig.demo.palette import COLOURS, IMAGE_SIZE_PX, Rgb, draw_number, light_tint, pick_colours, tinted

MIN_VALUE, MAX_VALUE = 1, 20
UNIT_PX = 5
"""Height of one unit of the value axis."""
_LABEL_EVERY = 5
_MIN_BARS, _MAX_BARS = 4, 6

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Bar:
    """One bar: a colour's name and a value from `MIN_VALUE` to `MAX_VALUE`."""

    colour: str
    value: int

    @property
    def question(self) -> str:
        """What is asked about this bar."""
        return f"What is the value of the {self.colour} bar?"


@dataclass(frozen=True)
class Chart:
    """The bars of one chart from left to right, the place of the one that is asked for, and the seed of its looks."""

    bars: tuple[Bar, ...]
    asked: int
    look_seed: int

    @property
    def split(self) -> Split:
        """The split that the bars' values belong to: no two splits ever share a tuple of values."""
        values = " ".join(str(bar.value) for bar in self.bars)
        return "test" if hashlib.sha256(values.encode()).digest()[0] % 10 == 0 else "train"


@dataclass(frozen=True)
class TaskFiles:
    """The two JSONL files of the task; their pictures lie beside them in `images/`."""

    train_jsonl: Path
    test_jsonl: Path


def draw_chart(chart: Chart) -> Image.Image:
    """The 128 x 128 px RGB picture of `chart`."""
    rng = Random(chart.look_seed)
    paper = light_tint(rng)
    image = Image.new("RGB", (IMAGE_SIZE_PX, IMAGE_SIZE_PX), paper)
    draw = ImageDraw.Draw(image)
    axis_x_px, floor_y_px = rng.randint(14, 20), rng.randint(112, 120)
    right_px = rng.randint(116, 124)
    _draw_axis(draw, rng, (axis_x_px, floor_y_px, right_px))
    slot_px = (right_px - axis_x_px - 2) // len(chart.bars)
    width_px = rng.randint(slot_px // 2, slot_px - 1)
    first_px = axis_x_px + 2 + (slot_px - width_px) // 2
    for index, bar in enumerate(chart.bars):
        left_px = first_px + index * slot_px
        box = (left_px, floor_y_px - bar.value * UNIT_PX, left_px + width_px - 1, floor_y_px - 1)
        draw.rectangle(box, fill=tinted(COLOURS[bar.colour], rng))
    return image


def _draw_axis(draw: ImageDraw.ImageDraw, rng: Random, place_px: tuple[int, int, int]) -> None:
    axis_x_px, floor_y_px, right_px = place_px
    top_y_px = floor_y_px - MAX_VALUE * UNIT_PX
    if rng.random() < 0.5:
        draw.rectangle((axis_x_px, top_y_px, right_px, floor_y_px), fill=light_tint(rng, lowest=216))
    ink, grid = _grey(rng.randint(30, 90)), _grey(rng.randint(160, 205))
    for value in range(0, MAX_VALUE + 1, _LABEL_EVERY):
        y_px = floor_y_px - value * UNIT_PX
        draw.line((axis_x_px, y_px, right_px, y_px), fill=grid)
        draw.line((axis_x_px - 2, y_px, axis_x_px, y_px), fill=ink)
        draw_number(draw, value, axis_x_px - 4, y_px, ink)
    draw.line((axis_x_px, top_y_px, axis_x_px, floor_y_px), fill=ink)
    draw.line((axis_x_px, floor_y_px, right_px, floor_y_px), fill=ink)


def _grey(level: int) -> Rgb:
    return (level, level, level)


def deal_charts(split: Split, num_charts: int, *, seed: int) -> Iterator[Chart]:
    """`num_charts` charts of `split`; the asked values come off a shuffled deck, so that all come equally often."""
    rng = Random(f"{seed} {split}")
    deck: list[int] = []
    for _ in range(num_charts):
        if not deck:
            deck = list(range(MIN_VALUE, MAX_VALUE + 1))
            rng.shuffle(deck)
        yield _draw_until_in(split, deck.pop(), rng)


def _draw_until_in(split: Split, asked_value: int, rng: Random) -> Chart:
    """A random chart whose asked bar has `asked_value`, drawn again until its values belong to `split`."""
    while True:
        num_bars = rng.randint(_MIN_BARS, _MAX_BARS)
        values = [rng.randint(MIN_VALUE, MAX_VALUE) for _ in range(num_bars)]
        asked = rng.randrange(num_bars)
        values[asked] = asked_value
        bars = tuple(Bar(colour, value) for colour, value in zip(pick_colours(rng, num_bars), values, strict=True))
        chart = Chart(bars, asked, look_seed=rng.getrandbits(48))
        if chart.split == split:
            return chart


def write_task(
    folder: Path,
    *,
    seed: int,
    num_train_images: int,
    num_test_images: int,
) -> TaskFiles:
    """Writes the task to `folder` as PNG files and JSONL in the LLaVA shape, and returns the paths of the JSONL files.

    A training picture comes with a question on each of its bars, as turns of one conversation; a test
    picture with one question. The same seed writes the same files.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sizes: dict[Split, int] = {"train": num_train_images, "test": num_test_images}
    paths = {split: folder / f"{split}.jsonl" for split in sizes}
    for split, num_images in sizes.items():
        with paths[split].open("w", encoding="utf-8", newline="\n") as lines:
            for index, chart in enumerate(deal_charts(split, num_images, seed=seed)):
                name = f"{split}-{index:05d}"
                draw_chart(chart).save(folder / "images" / f"{name}.png")
                lines.write(json.dumps(_record(name, chart, one_question=split != "train")) + "\n")
    return TaskFiles(paths["train"], paths["test"])


def _record(name: str, chart: Chart, *, one_question: bool) -> dict[str, object]:
    bars = [chart.bars[chart.asked]]
    if not one_question:
        bars += Random(chart.look_seed).sample([bar for bar in chart.bars if bar is not bars[0]], len(chart.bars) - 1)
    turns = []
    for index, bar in enumerate(bars):
        text = f"<image>\n{bar.question}" if index == 0 else bar.question
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": str(bar.value)}]
    return {"id": name, "image": f"images/{name}.png", "conversations": turns}
