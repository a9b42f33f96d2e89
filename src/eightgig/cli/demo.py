"""`eightgig demo`: see it learn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_demo_outcome
from eightgig.cli.progress import open_listener
from eightgig.cli.session import session_of, stoppable

EXAMPLES = examples("eightgig demo", "eightgig demo --output-dir /tmp/demo --seed 1")


def demo(
    context: typer.Context,
    output_dir: Annotated[Path, typer.Option(help="Where data, run and report are written.")] = Path("eightgig-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the data and of the training.")] = 0,
) -> None:
    """See it learn: fine-tune the packaged model on a task new to it, without a GPU.

    Writes pictures and questions, trains, and compares the answers on held-out pictures before and after.
    """
    with open_listener(session_of(context)) as listener, stoppable():
        from eightgig.app import demonstration

        outcome = demonstration.run_demo(output_dir=output_dir, seed=seed, listener=listener)
    print_demo_outcome(outcome)
