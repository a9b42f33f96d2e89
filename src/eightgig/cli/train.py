"""`eightgig train`: fine-tune a model, or go on with a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import typer

from eightgig.cli import options
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


def train(  # noqa: PLR0913 - the parameters are the command line itself
    context: typer.Context,
    source: options.Source = None,
    preset: options.Preset = None,
    settings: options.Settings = None,
    model: options.Model = None,
    data: options.Data = None,
    val: options.Validation = None,
    image_root: options.ImageRoot = None,
    output_dir: options.OutputDir = None,
    run_folder: options.RunFolder = None,
    max_steps: options.MaxSteps = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    no_rehearsal: options.NoRehearsal = False,
    random_weights: options.RandomWeights = None,
    cap_gib: options.CapGib = None,
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
        "--no-rehearsal": False if no_rehearsal else None,
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
