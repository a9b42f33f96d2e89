"""What the planner said of runs beside what they took on a GPU: the rows of the record, and how many came out close."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eightgig.core.units import MIB

KINDS = ("allocated", "reserved", "device")
# The bars of the planner's issue; the device's may also be met in bytes.
BARS: Mapping[str, float] = {"allocated": 0.01, "reserved": 0.03, "device": 0.03}
DEVICE_BAR_BYTES = 100 * MIB


def read_measured(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """By the run's name: what it took, of all the records together."""
    measured: dict[str, dict[str, Any]] = {}
    for path in paths:
        for row in json.loads(path.read_text())["figures"]["runs"]:
            if row["name"] in measured:
                raise SystemExit(f"{row['name']} stands in two records; leave one out")
            measured[row["name"]] = row["measured"]
    return measured


def sources(paths: Iterable[Path]) -> dict[str, Any]:
    """Of each record by its file's name: on what, with what and when it was measured."""
    told = ("date", "commit", "device", "versions", "conditions")
    records = {path.name: json.loads(path.read_text()) for path in paths}
    return {name: {key: record[key] for key in told} for name, record in records.items()}


def comparison_row(
    planned: Mapping[str, Any], measured: Mapping[str, Any], part: str, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """One run: its settings, what was measured, planned now and (`before`, of a blind run) before it was measured.

    `planned` and `before` are rows of `planned_runs.predict`, `measured` one of `planned_runs.measure`.
    """
    of_run = ("name", "model", "preset", "settings", "mixes_lengths", "num_tokens")
    row: dict[str, Any] = {key: planned[key] for key in of_run}
    row["part"] = part
    row["measured"] = {f"{kind}_bytes": measured[f"{kind}_bytes"] for kind in KINDS}
    row |= _said(planned, measured)
    if before is not None:
        row["before"] = _said(before, measured)
    return row


def _said(planned: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was planned, and each error as a share of the measured."""
    sizes = {f"{kind}_bytes": planned[f"{kind}_bytes"] for kind in KINDS}
    errors = {kind: planned[f"{kind}_bytes"] / measured[f"{kind}_bytes"] - 1 for kind in KINDS}
    return {"planned": sizes | {key: planned[key] for key in ("moment", "planning_s")}, "errors": errors}


def summary(rows: Sequence[Mapping[str, Any]], said_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """Of `rows`: how many are within each bar and which one is the worst, by what `said_of` takes from a row."""
    told: dict[str, Any] = {"num_runs": len(rows)}
    if not rows:
        return told
    for kind in KINDS:
        close = [row for row in rows if is_close(kind, row["measured"], said_of(row))]
        worst = max(rows, key=lambda row: abs(said_of(row)["errors"][kind]))
        told[kind] = {
            "num_close": len(close),
            "worst_run": worst["name"],
            "worst_error": said_of(worst)["errors"][kind],
        }
    return told


def is_close(kind: str, measured: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether what was said is within the bar of `kind`."""
    if kind == "device" and abs(said["planned"]["device_bytes"] - measured["device_bytes"]) <= DEVICE_BAR_BYTES:
        return True
    return abs(said["errors"][kind]) <= BARS[kind]


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record's figures: the rows, and their summaries."""
    parts = {part: [row for row in rows if row["part"] == part] for part in ("blind", "blind_again")}
    return {
        "bars": {**BARS, "device_bytes": DEVICE_BAR_BYTES},
        "blind_before": summary(parts["blind"], lambda row: row["before"]),
        "blind_again_before": summary(parts["blind_again"], lambda row: row["before"]),
        "all_now": summary(rows, lambda row: row),
        "runs": list(rows),
    }
