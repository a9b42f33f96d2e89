"""Questions with their answers, and the two units in which a scene's lengths and places are told."""

from __future__ import annotations

from dataclasses import dataclass

LARGE_UNIT_PX = 6
SMALL_UNIT_PX = 4
MAX_NUMBER = 20
"""Every number in the scenes is a whole one from 0 to 20."""


@dataclass(frozen=True)
class Question:
    """One question on one picture: `kind` names what has to be seen, `answer` is the only right text."""

    kind: str
    text: str
    answer: str


def whole_units(distance_px: int, unit_px: int) -> int | None:
    """The number of units in `distance_px`, or None where it is out of 0-20 or within a pixel of the next number.

    The gap of two pixels or more between neighbouring numbers keeps each question's answer a matter of what is drawn.
    """
    number = (distance_px + unit_px // 2) // unit_px
    offset_px = abs(distance_px - number * unit_px)
    if offset_px > unit_px // 2 - 1 or not 0 <= number <= MAX_NUMBER:
        return None
    return number


def measured(kind: str, text: str, distance_px: int, unit_px: int = LARGE_UNIT_PX) -> list[Question]:
    """One question answered by `distance_px` in units, or none where that number would be ambiguous."""
    number = whole_units(distance_px, unit_px)
    return [] if number is None else [Question(kind, text, str(number))]


def yes_or_no(kind: str, text: str, holds: bool) -> Question:
    """A question answered "yes" or "no"."""
    return Question(kind, text, "yes" if holds else "no")
