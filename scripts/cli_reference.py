#!/usr/bin/env python3
"""Write docs/reference/cli.md from the command line itself; a test fails where the two differ.

usage: python scripts/cli_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from eightgig.cli.application import app

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
_HEADER = """# The command `eightgig`

<!-- Written by scripts/cli_reference.py: change the options in src/eightgig/cli and run it again. -->

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 2 a wrong option or setting, 3 data,
4 does not fit into memory or on the disk, 5 model not supported, 6 environment, 7 checkpoint or run folder,
8 no finite loss or gradient in many steps in a row,
70 an unexpected error (its traceback is in a file that the message names), 130 stopped with Ctrl-C, 143 with SIGTERM.

`eightgig --install-completion` sets up completion for bash, zsh, fish or PowerShell.
"""


def render_reference() -> str:
    """The reference of every verb, as Markdown."""
    return "\n".join([_HEADER, *_sections("eightgig", typer.main.get_command(app))])


def _sections(path: str, command: Any) -> Iterator[str]:
    """The section of a command, then those of its verbs."""
    yield f"## `{path}`\n"
    yield f"{command.help}\n"
    rows = [_row(parameter) for parameter in command.params if not parameter.name.endswith("_completion")]
    if rows:
        yield "\n".join(["| Argument or option | Default | What it does |", "|---|---|---|", *rows]) + "\n"
    if command.epilog:
        commands = [line for line in command.epilog.split("\n\n") if line.startswith("eightgig")]
        yield "\n".join(["```bash", *commands, "```"]) + "\n"
    for name, verb in getattr(command, "commands", {}).items():
        yield from _sections(f"{path} {name}", verb)


def _row(parameter: Any) -> str:
    """The table row of one argument or option."""
    is_option = parameter.opts[0].startswith("-")
    names = " ".join(f"`{name}`" for name in parameter.opts) if is_option else f"`{parameter.metavar}`"
    if is_option and parameter.metavar:
        names = f"`{parameter.opts[0]} {parameter.metavar}`"
    required = "required" if parameter.required else ""
    default = None if isinstance(parameter.default, bool) else parameter.default
    cells = (names, required if default is None else f"`{default}`", str(parameter.help))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Write the file."""
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(render_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
