"""`eightgig report`: write a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eightgig.cli.examples import examples

EXAMPLES = examples("eightgig report runs/llava-1.5-7b-20261124-093000")


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The run's folder, of a running run too.", show_default=False)
    ],
) -> None:
    """Write a run's report again: one HTML file that needs nothing but itself.

    Prints the path of the file.
    """
    from eightgig.app import reporting

    typer.echo(str(reporting.write_report(run)))
