"""The scenes: the same for a seed, and every number asked is the one that the pixels show."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.demo.pixels import mask_of, num_components, rows_and_columns

from eightgig.demo.palette import IMAGE_SIZE_PX
from eightgig.demo.scenes import MAX_NUMBER, Question, Scene, render_scene, whole_units
from eightgig.demo.scenes.question import LARGE_UNIT_PX, SMALL_UNIT_PX

NUM_SCENES = 600
# Floors and lines are dark grey, which pixels can't tell from black things.
UNREADABLE = "black"


def asked(kind: str) -> list[tuple[Scene, Question, str]]:
    """Scenes, their questions of `kind` and the colour named in each."""
    found = []
    for seed in range(NUM_SCENES):
        scene = render_scene(seed, max_num_questions=100)
        for question in scene.questions:
            colours = re.findall(r"red|orange|yellow|green|cyan|blue|purple|pink|brown|black", question.text)
            if question.kind == kind and colours != [UNREADABLE]:
                found.append((scene, question, colours[0] if colours else ""))
    assert len(found) >= 30
    return found


def nearest(distance_px: float, unit_px: int) -> str:
    return str(int(distance_px / unit_px + 0.5))


def test_a_seed_names_one_scene() -> None:
    pictures = set()
    for seed in range(50):
        one, again = render_scene(seed), render_scene(seed)
        assert one.image.tobytes() == again.image.tobytes()
        assert one.questions == again.questions
        assert one.image.size == (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
        pictures.add(one.image.tobytes())
    assert len(pictures) == 50


@pytest.mark.parametrize(("kind", "unit_px"), [("height", LARGE_UNIT_PX), ("height in small units", SMALL_UNIT_PX)])
def test_heights_are_the_bars_rows(kind: str, unit_px: int) -> None:
    for scene, question, colour in asked(kind):
        first_row, last_row, _, _ = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest(last_row - first_row + 1, unit_px), question


@pytest.mark.parametrize(("kind", "unit_px"), [("length", LARGE_UNIT_PX), ("length in small units", SMALL_UNIT_PX)])
def test_lengths_are_the_rods_columns(kind: str, unit_px: int) -> None:
    for scene, question, colour in asked(kind):
        _, _, first_column, last_column = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest(last_column - first_column + 1, unit_px), question


def test_places_are_the_middles_of_things() -> None:
    for scene, question, colour in asked("place across"):
        _, _, first_column, last_column = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest((first_column + last_column) / 2, LARGE_UNIT_PX), question
    for scene, question, colour in asked("place up"):
        first_row, last_row, _, _ = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest(IMAGE_SIZE_PX - (first_row + last_row) / 2, LARGE_UNIT_PX), question


def test_ends_are_where_the_pixels_end() -> None:
    for scene, question, colour in asked("place of a top"):
        first_row, *_ = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest(IMAGE_SIZE_PX - first_row, LARGE_UNIT_PX), question
    for scene, question, colour in asked("place of an end"):
        *_, last_column = rows_and_columns(mask_of(scene.image, colour))
        assert question.answer == nearest(last_column + 1, LARGE_UNIT_PX), question


def test_dots_are_counted() -> None:
    answers = set()
    for scene, question, colour in asked("count of dots"):
        assert question.answer == str(num_components(mask_of(scene.image, colour))), question
        answers.add(int(question.answer))
    assert answers == set(range(MAX_NUMBER + 1))


def test_a_cards_value_is_its_pips() -> None:
    for scene, question, colour in asked("value of a card"):
        first_row, last_row, first_column, last_column = rows_and_columns(mask_of(scene.image, colour))
        card = np.asarray(scene.image)[first_row : last_row + 1, first_column : last_column + 1]
        assert question.answer == str(num_components((card == 252).all(axis=2))), question


def test_the_tallest_bar_has_the_most_rows() -> None:
    for scene, question, _ in asked("most tall"):
        if question.answer == UNREADABLE:
            continue
        heights = {}
        for other in scene.questions:
            if other.kind == "place of a top" and UNREADABLE not in other.text:
                colour = other.text.split()[-2]
                first_row, last_row, _, _ = rows_and_columns(mask_of(scene.image, colour))
                heights[colour] = last_row - first_row
        if question.answer in heights:
            assert heights[question.answer] == max(heights.values()), question


@given(st.integers(0, 200), st.sampled_from([4, 6]))
def test_a_number_is_told_only_where_it_is_plain(distance_px: int, unit_px: int) -> None:
    number = whole_units(distance_px, unit_px)
    plain = {
        count * unit_px + offset_px: count
        for count in range(MAX_NUMBER + 1)
        for offset_px in range(1 - unit_px // 2, unit_px // 2)
    }
    assert number == plain.get(distance_px)


def test_no_scene_speaks_of_a_chart() -> None:
    words = " ".join(question.text for seed in range(NUM_SCENES) for question in render_scene(seed).questions).lower()
    assert not re.search(r"chart|graph|axis|gauge|dial|value of the \w+ bar", words)
