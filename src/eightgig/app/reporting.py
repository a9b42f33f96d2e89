"""`eightgig report`: one HTML file of a run."""

from __future__ import annotations

from pathlib import Path

from eightgig.core.files import write_text
from eightgig.report.html import render_report
from eightgig.report.records import read_run
from eightgig.train.run_folder import RunFolder


def write_report(run_folder: Path) -> Path:
    """Write `report.html` of the run in `run_folder` from its records; returns its path.

    Raises:
        CheckpointError: there is no run, or its records are damaged.
    """
    folder = RunFolder.open(run_folder)
    write_text(folder.report, render_report(read_run(folder.path)))
    return folder.report
