"""`eightgig inspect`: what of a model is really 4-bit."""

from __future__ import annotations

from typing import Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.cli.receipt import receipt_lines
from eightgig.cli.session import stoppable

EXAMPLES = examples(
    "eightgig inspect runs/llava-1.5-7b-20261124-093000",
    "eightgig inspect eightgig-demo",
    "eightgig inspect llava-1.5-7b --random-weights 0 --json",
)


def inspect(
    target: Annotated[str, typer.Argument(help="A run's folder, or a model.", metavar="RUN|MODEL", show_default=False)],
    random_weights: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Build the model with random weights instead of its own."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Show what of a model is really 4-bit, part by part.

    For each part: how it is stored, its parameters, its bytes at 16 bits and now. Of a run
    its receipt is read; a model is loaded in 4 bits and measured.
    """
    from eightgig.app import inspection

    with stoppable():
        receipt = inspection.inspect(target, random_weights_seed=random_weights).to_json()
    if as_json:
        print_json(receipt)
    else:
        for line in receipt_lines(receipt):
            typer.echo(line)
