"""HTML files: the report of a run (`eightgig report`), a plan, the table of cards and models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightgig.core.files import write_text
from eightgig.report.html import render_report
from eightgig.report.matrix_page import render_matrix
from eightgig.report.plan_page import render_plan
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


def write_plan_page(path: Path, plan: Mapping[str, Any]) -> Path:
    """Write the page of `plan` (`Plan.to_json()`), whole or not at all; returns its path."""
    write_text(path, render_plan(plan))
    return path


def write_matrix_page(path: Path, matrix: Mapping[str, Any]) -> Path:
    """Write the page of `matrix` (`Matrix.to_json()`), whole or not at all; returns its path."""
    write_text(path, render_matrix(matrix))
    return path
