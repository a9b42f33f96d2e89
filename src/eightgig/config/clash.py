"""Two settings that can't both hold: how a model reports them, all at once and each at its own path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

CLASH = "clash"  # the pydantic error type that `messages` knows


@dataclass(frozen=True)
class Clash:
    """A contradiction, reported at `path`.

    Attributes:
        path: of the setting that is reported, from the section that checks it.
        value: of that setting.
        allowed: what would be right, naming the other setting and its value.
        other: full dotted path of the other setting.
    """

    path: tuple[str, ...]
    value: Any
    allowed: str
    other: str


def raise_clashes(section: str, clashes: Sequence[Clash]) -> None:
    """Raise one pydantic ValidationError with every clash at its own path; return where there is none."""
    if clashes:
        raise ValidationError.from_exception_data(section, [_details(clash) for clash in clashes])


def _details(clash: Clash) -> InitErrorDetails:
    error = PydanticCustomError(CLASH, "{allowed}", {"allowed": clash.allowed, "other": clash.other})
    return InitErrorDetails(type=error, loc=clash.path, input=clash.value)
