"""The Typer application: global options, and the verbs, each from its own module."""

from __future__ import annotations

from typing import Annotated

import typer

from eightgig import __version__
from eightgig.cli import config, demo, doctor, inspect, models, plan, predict, report, train
from eightgig.cli.examples import examples
from eightgig.cli.session import session_of, start_logging

app = typer.Typer(
    name="eightgig",
    help="Fine-tune vision-language models with QLoRA on an 8 GB graphics card.",
    epilog=examples(
        "eightgig demo",
        "eightgig train ultra_low_memory --data train.jsonl",
        "eightgig predict RUN --image chart.png --question 'How tall is bar 3?'",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `entry` says what went wrong
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eightgig {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the package's own log.")] = False,
) -> None:
    session_of(context).debug = debug
    start_logging(debug=debug)


app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("predict", epilog=predict.EXAMPLES)(predict.predict)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.add_typer(models.app, name="models")
app.add_typer(config.app, name="config")
