"""The options of `train`, as types: what each is called, what it takes, what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eightgig.cli.settings import DEFAULT_PRESET

_MODEL_AND_DATA = "Model and data"
_RUN = "The run"
_BENCHMARKS = "For benchmarks and self-tests"

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="PRESET|FILE", help="A preset's name, or a file of settings (YAML or JSON).", show_default=False
    ),
]
Preset = Annotated[
    str | None, typer.Option(help=f"The preset below a file of settings ({DEFAULT_PRESET} if there is neither).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="One setting; may be repeated.", show_default=False),
]
Model = Annotated[
    str | None, typer.Option(help="A known model, a folder or a hub id.", rich_help_panel=_MODEL_AND_DATA)
]
# Paths that are settings stay text here: `Path("")`, of an unset shell variable, would be the folder one is in.
Data = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Training data: a file or a folder.", rich_help_panel=_MODEL_AND_DATA),
]
Validation = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Validation data; without it a share is held out.", rich_help_panel=_MODEL_AND_DATA
    ),
]
ImageRoot = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Where relative image paths start.", rich_help_panel=_MODEL_AND_DATA),
]
OutputDir = Annotated[
    str | None, typer.Option(metavar="PATH", help="Where the run's own folder is made.", rich_help_panel=_RUN)
]
RunFolder = Annotated[
    Path | None, typer.Option(help="The run's folder itself; must not exist yet.", rich_help_panel=_RUN)
]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this many steps.", rich_help_panel=_RUN)]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Go on with this run, alone, with its own settings.", rich_help_panel=_RUN),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Do everything up to the first step.", rich_help_panel=_RUN)]
NoRehearsal = Annotated[
    bool,
    typer.Option(
        "--no-rehearsal",
        help="Begin without trying the largest batch, a validation and a checkpoint.",
        rich_help_panel=_RUN,
    ),
]
RandomWeights = Annotated[
    int | None,
    typer.Option(
        metavar="SEED",
        help="Random weights made on the device instead of the model's own.",
        rich_help_panel=_BENCHMARKS,
    ),
]
CapGib = Annotated[
    float | None,
    typer.Option(help="Limit of the GPU memory that PyTorch may reserve.", rich_help_panel=_BENCHMARKS),
]
