"""`eightgig config`: what can be set, and what is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.cli.settings import parse_assignments

if TYPE_CHECKING:
    from eightgig.config import Row

_WIDTH_CHARACTERS = 80

app = typer.Typer(
    help="Print all settings there are, or those of a preset or file.",
    epilog=examples("eightgig config schema", "eightgig config show ultra_low_memory"),
    no_args_is_help=True,
)


@app.command("schema", epilog=examples("eightgig config schema", "eightgig config schema > eightgig.schema.json"))
def schema() -> None:
    """Print the JSON schema of a settings file, for editors that check and complete."""
    from eightgig.config import json_schema

    print_json(json_schema())


@app.command(
    "show",
    epilog=examples(
        "eightgig config show ultra_low_memory",
        "eightgig config show my.yaml --set training.lora.rank=16",
        "eightgig config show my.yaml --json",
    ),
)
def show(
    source: Annotated[
        str, typer.Argument(metavar="PRESET|FILE", help="A preset's name, or a file.", show_default=False)
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="One setting on top; may be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print path, value, source and reason as JSON.")] = False,
) -> None:
    """Print every setting with its value, where that came from, and why."""
    from eightgig.config import ConfigPresets, describe, resolve
    from eightgig.config.rules import value_at

    resolved = resolve(source, parse_assignments(settings or []))
    rows = describe(resolved)
    if as_json:
        values = {row.path: value_at(resolved.config, row.path) for row in rows}
        print_json(
            {row.path: {"value": _plain(values[row.path]), "source": row.source, "reason": row.reason} for row in rows}
        )
    else:
        if resolved.config.preset is not None:
            card = ConfigPresets.card(resolved.config.preset)
            typer.echo(f"preset {card.name}: {card.purpose}\nmade for cards of {card.card}\n")
        for line in setting_lines(rows):
            typer.echo(line)


def setting_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The settings by section, each with its source, and the reason indented below."""
    last_section = None
    for row in rows:
        section, _, name = row.path.rpartition(".")
        if section != last_section:
            if last_section is not None:
                yield ""
            yield section or "general"
            last_section = section
        setting = f"  {name} = {row.value}"
        yield f"{setting:<44} {row.source}"
        yield from textwrap.wrap(
            row.reason, _WIDTH_CHARACTERS, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )


def _plain(value: object) -> object:
    """`value` as JSON knows it."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
