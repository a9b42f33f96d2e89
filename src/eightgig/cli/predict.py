"""`eightgig predict`: ask a question about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.cli.session import stoppable

EXAMPLES = examples(
    "eightgig predict runs/charts --image chart.png --question 'How tall is bar 3?'",
    "eightgig predict --model eightgig-demo --image scene.png --question 'How many?'",
    "eightgig predict runs/charts --image a.png --image b.png --question 'Same?' --json",
)


def predict(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, or an adapter's.", metavar="RUN", show_default=False)
    ] = None,
    *,
    question: Annotated[str, typer.Option(help="What to ask.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be repeated.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model without adapter, or the one to put RUN's adapter on.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print answer, model and adapter as JSON.")] = False,
) -> None:
    """Ask a trained adapter, or a model as it is, a question about pictures."""
    if run is None and model is None:
        raise typer.BadParameter("give the folder of a RUN, or --model NAME to ask a model as it is")
    from eightgig.app import prediction

    with stoppable():
        answer = prediction.predict(
            question=question, images=image or [], run=run, model=model, max_new_tokens=max_new_tokens
        )
    if as_json:
        adapter = None if answer.adapter is None else str(answer.adapter)
        print_json({"question": question, "answer": answer.answer, "model": answer.model, "adapter": adapter})
    else:
        typer.echo(answer.answer)
