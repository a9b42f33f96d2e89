"""Results on stdout: plain lines, the same on a terminal and in a pipe."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eightgig.cli.session import is_main_process
from eightgig.core.units import format_bytes, format_duration
from eightgig.report.wording import format_number, format_share

if TYPE_CHECKING:
    from eightgig.app.demonstration import DemoOutcome
    from eightgig.train.events import RunOutcome


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    for name, value in rows:
        typer.echo(f"{name:<13} {value}")


def print_run_outcome(outcome: RunOutcome) -> None:
    """Print what a run ended with, its numbers and files; once, however many processes trained."""
    if is_main_process():
        print_rows(run_outcome_rows(outcome))


def print_demo_outcome(outcome: DemoOutcome) -> None:
    """Print the demonstration's result and the commands to go on with."""
    before, after = format_share(outcome.before), format_share(outcome.after)
    print_rows(
        [
            ("exact match", f"{before} before, {after} after training, on {outcome.num_images} held-out images"),
            ("training", format_duration(outcome.train_s)),
            ("adapter", str(outcome.adapter_folder)),
            ("report", str(outcome.report_path)),
        ]
    )
    typer.echo("\nnext, with your own data:")
    for command in outcome.next_commands:
        typer.echo(f"  {_typeable(command)}")


def _typeable(command: str) -> str:
    """`command` with this program's path where its name alone would not be found, as after `make demo`."""
    if shutil.which("eightgig") is not None:
        return command
    return command.replace("eightgig", str(Path(sys.argv[0])), 1)


def run_outcome_rows(outcome: RunOutcome) -> list[tuple[str, str]]:
    """What a run ended with, as name and value; only what there is."""
    rows = [("status", f"{outcome.status} after {outcome.steps_done} steps, {format_duration(outcome.train_s)}")]
    if outcome.final_loss is not None:
        rows.append(("final loss", format_number(outcome.final_loss)))
    if outcome.exact_match_after is not None:
        before, after = format_share(outcome.exact_match_before), format_share(outcome.exact_match_after)
        rows.append(("exact match", f"{before} before, {after} after training"))
    peak_bytes = outcome.peak.get("peak_reserved_bytes") or outcome.peak.get("host_peak_rss_bytes")
    if peak_bytes:
        where = "reserved on the GPU" if outcome.peak.get("peak_reserved_bytes") else "RAM"
        rows.append(("peak memory", f"{format_bytes(peak_bytes)} {where}"))
    if outcome.verification is not None:
        rows.append(("reloaded", _verification_text(outcome.verification)))
    if outcome.adapter_folder is not None:
        rows.append(("adapter", str(outcome.adapter_folder)))
    if outcome.report_path is not None:
        rows.append(("report", str(outcome.report_path)))
    return [*rows, ("run folder", str(outcome.run_folder))]


def _verification_text(verification: Any) -> str:
    difference = format_number(verification["max_abs_difference"])
    if verification["ok"]:
        return f"the saved adapter gives the same logits in a fresh process (largest difference {difference})"
    return f"NOT THE SAME: the saved adapter's logits differ by {difference} in a fresh process"
