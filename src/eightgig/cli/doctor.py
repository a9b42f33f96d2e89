"""`eightgig doctor`: what this machine can do and what is in the way."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.core.errors import EnvironmentProblem

if TYPE_CHECKING:
    from eightgig.app.doctor import Diagnosis, Finding

EXAMPLES = examples("eightgig doctor", "eightgig doctor --json")

COLUMNS = 80
_INDENT = " " * 25


def doctor(
    folder: Annotated[
        Path, typer.Option(help="Where runs would be written; its disk is tried.", metavar="FOLDER")
    ] = Path(),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at card, driver, packages, memory and disk, try a 4-bit product, and say what to do.

    Exits with 6 where something that is meant to work does not; having no card is no failure.
    """
    from eightgig.app.doctor import examine

    diagnosis = examine(folder.absolute())
    if as_json:
        print_json(diagnosis.to_json())
    else:
        for line in lines(diagnosis):
            typer.echo(line)
    if not diagnosis.is_well:
        raise typer.Exit(EnvironmentProblem.exit_code)


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """The findings, and what they come to, at most 80 columns wide but for what can't be broken."""
    for finding in diagnosis.findings:
        yield from _finding_lines(finding)
    yield ""
    if diagnosis.is_well:
        yield "nothing is in the way"
    else:
        names = ", ".join(each.name for each in diagnosis.problems)
        yield from textwrap.wrap(f"in the way: {names}; each line above says what to do", COLUMNS)


def _finding_lines(finding: Finding) -> Iterator[str]:
    first = f"{finding.state.value:<9}{finding.name:<16}"
    yield from _wrapped(finding.found, first)
    if finding.todo:
        yield from _wrapped(f"→ {finding.todo}", _INDENT)


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text, COLUMNS, initial_indent=first, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    )
