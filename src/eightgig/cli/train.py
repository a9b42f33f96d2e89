"""`eightgig train`: fine-tune a model, or go on with a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_run_outcome
from eightgig.cli.progress import open_listener
from eightgig.cli.session import Session, session_of, stoppable
from eightgig.cli.settings import (
    DEFAULT_PRESET,
    parse_assignments,
    refuse_beside_resume,
    resolve_settings,
    uses_default_preset,
)

EXAMPLES = examples(
    "eightgig train --data train.jsonl",
    "eightgig train low_memory --data train.jsonl --val val.jsonl",
    "eightgig train my.yaml --set training.lora.rank=16 --set training.num_epochs=1",
    "eightgig train my.yaml --dry-run",
    "eightgig train --resume runs/llava-1.5-7b-20261124-093000",
)

_MODEL_AND_DATA = "Model and data"
_RUN = "The run"
_BENCHMARKS = "For benchmarks and self-tests"


def train(  # noqa: PLR0913 - the parameters are the command line itself
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET|FILE", help="A preset's name, or a file of settings (YAML or JSON).", show_default=False
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"The preset below a file of settings ({DEFAULT_PRESET} if there is neither).", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="One setting; may be repeated.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A known model, a folder or a hub id.", rich_help_panel=_MODEL_AND_DATA),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training data: a file or a folder.", rich_help_panel=_MODEL_AND_DATA)
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(help="Validation data; without it a share is held out.", rich_help_panel=_MODEL_AND_DATA),
    ] = None,
    image_root: Annotated[
        Path | None,
        typer.Option(help="Where relative image paths start.", rich_help_panel=_MODEL_AND_DATA),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the run's own folder is made.", rich_help_panel=_RUN)
    ] = None,
    run_folder: Annotated[
        Path | None, typer.Option(help="The run's folder itself; must not exist yet.", rich_help_panel=_RUN)
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.", rich_help_panel=_RUN)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with this run, alone, with its own settings.", rich_help_panel=_RUN),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step.", rich_help_panel=_RUN)
    ] = False,
    random_weights: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Random weights made on the device instead of the model's own.",
            rich_help_panel=_BENCHMARKS,
        ),
    ] = None,
    cap_gib: Annotated[
        float | None,
        typer.Option(help="Limit of the GPU memory that PyTorch may reserve.", rich_help_panel=_BENCHMARKS),
    ] = None,
) -> None:
    """Fine-tune a model on your images and questions.

    Settings come from the defaults, the preset, the file and the options; the later ones win.
    """
    session = session_of(context)
    flags = {
        "--preset": preset,
        "--model": model,
        "--data": data,
        "--val": val,
        "--image-root": image_root,
        "--output-dir": output_dir,
        "--max-steps": max_steps,
        "--random-weights": random_weights,
        "--cap-gib": cap_gib,
    }
    if resume is not None:
        others = {"--set": " ".join(settings or []) or None, "--run-folder": run_folder, "--dry-run": dry_run or None}
        refuse_beside_resume({"PRESET|FILE": source, **flags, **others})
        _resume(session, resume)
    else:
        _train(session, source, flags, parse_assignments(settings or []), run_folder=run_folder, dry_run=dry_run)


def _train(
    session: Session,
    source: str | None,
    flags: Mapping[str, object | None],
    overrides: Mapping[str, str],
    *,
    run_folder: Path | None,
    dry_run: bool,
) -> None:
    resolved = resolve_settings(source, flags, overrides)
    with open_listener(session) as listener, stoppable():
        if uses_default_preset(source, flags, overrides):
            listener.on_message(f"no preset and no file of settings given: using preset {DEFAULT_PRESET}")
        from eightgig.app import training

        outcome = training.train(
            resolved.config,
            sources=resolved.sources,
            run_folder=run_folder,
            listener=listener,
            dry_run=dry_run,
            command=command_line(),
        )
    print_run_outcome(outcome)


def _resume(session: Session, run_folder: Path) -> None:
    session.run_folder = run_folder if run_folder.is_dir() else None
    with open_listener(session) as listener, stoppable():
        from eightgig.app import training

        outcome = training.resume(run_folder, listener=listener, command=command_line())
    print_run_outcome(outcome)


def command_line() -> str:
    """The command as the user could type it again."""
    return shlex.join(["eightgig", *sys.argv[1:]])
