"""The table of cards and models as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.core.units import format_bytes
from eightgig.report.pages import page_template
from eightgig.report.wording import format_count


@dataclass(frozen=True)
class MatrixCell:
    """A cell as it is shown.

    Attributes:
        text: the longest length, or a dash.
        css_class: `fit-0` (does not fit) to `fit-N`, N the place of the length on the ladder.
        speed: in multiples of the reference card's, empty where not known.
        title: the whole story, for the pointer.
    """

    text: str
    css_class: str
    speed: str
    title: str


@dataclass(frozen=True)
class MatrixRow:
    """A model with its cells, in the order of the cards."""

    model: str
    parameters: str
    cells: tuple[MatrixCell, ...]


def render_matrix(matrix: Mapping[str, Any]) -> str:
    """The page of `matrix`, which is what `Matrix.to_json()` gives, as HTML text."""
    cells = {(cell["model"], cell["gpu"]): cell for cell in matrix["cells"]}
    rows = [
        MatrixRow(
            model["name"],
            format_count(model["num_parameters"] or None),
            tuple(_cell(cells[model["name"], gpu["name"]], matrix) for gpu in matrix["gpus"]),
        )
        for model in matrix["models"]
    ]
    has_speeds = any(cell["tokens_per_s"] is not None for cell in matrix["cells"])
    return page_template("matrix.html.j2").render(matrix=matrix, rows=rows, has_speeds=has_speeds)


def _cell(cell: Mapping[str, Any], matrix: Mapping[str, Any]) -> MatrixCell:
    length, speed = cell["max_length_tokens"], cell["relative_speed"]
    place = 0 if length is None else matrix["ladder_tokens"].index(length) + 1
    tried = matrix["ladder_tokens"][0] if length is None else length
    story = f"{cell['model']} on {cell['gpu']}: {format_bytes(cell['device_bytes'])} at {tried:,} tokens"
    if cell["tokens_per_s"] is not None:
        story += f"; {cell['tokens_per_s']:,.0f} tokens/s at {matrix['common_tokens']:,}"
    return MatrixCell(
        text="–" if length is None else f"{length:,}",
        css_class=f"fit-{place}",
        speed="" if speed is None else f"×{speed:.2f}",
        title=story,
    )
