"""The runs that the planner was compared with: which they are, with which settings, and what is made of two records."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.planned_comparison import DEVICE_BAR_BYTES, is_close, read_measured
from benchmarks.planned_runs import BLIND, BLIND_AGAIN, BUILT, PARTS, PlannedRun

from eightgig.cli.settings import DEFAULT_PRESET, resolve_settings
from eightgig.config.loading import load_config, save_config

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MEASURED = [RESULTS / f"planned_runs_measured_{part}.json" for part in PARTS]


def test_every_run_was_measured_once() -> None:
    names = Counter(run.name for runs in PARTS.values() for run in runs)
    assert set(names.values()) == {1}
    assert set(read_measured(MEASURED)) == set(names)


@pytest.mark.parametrize(
    ("runs", "record"), [(BLIND, "planned_runs_before.json"), (BLIND_AGAIN, "planned_runs_before_again.json")]
)
def test_every_blind_run_was_planned_before(runs: tuple[PlannedRun, ...], record: str) -> None:
    before = json.loads((RESULTS / record).read_text())["figures"]["runs"]
    settings = {run.name: (run.model, run.settings, run.mixes_lengths) for run in runs}
    assert {row["name"]: (row["model"], row["settings"], row["mixes_lengths"]) for row in before} == settings


def test_a_third_of_the_runs_is_blind() -> None:
    """Those whose measurements no part of the planner has seen."""
    assert 3 * len(BLIND_AGAIN) >= sum(len(runs) for runs in PARTS.values())


def test_a_run_that_is_measured_twice_is_refused() -> None:
    with pytest.raises(SystemExit, match="stands in two records"):
        read_measured([MEASURED[0], MEASURED[0]])


@pytest.mark.parametrize("run", [run for run in BUILT if run.preset is not None], ids=lambda run: run.name)
def test_a_run_started_without_settings_has_those_of_the_command_line(run: PlannedRun) -> None:
    told = resolve_settings(None, {"--preset": None}, run.assignments()).config
    assert run.preset == told.preset == DEFAULT_PRESET
    assert run.config() == told


def test_the_settings_that_are_planned_are_those_that_are_measured(tmp_path: Path) -> None:
    for run in (run for runs in PARTS.values() for run in runs):
        path = tmp_path / f"{run.name}.yaml"
        save_config(run.config(), path)
        assert load_config(path).config == run.config()


@pytest.mark.parametrize(
    ("kind", "measured_bytes", "planned_bytes", "close"),
    [
        ("allocated", 10_000, 10_099, True),
        ("allocated", 10_000, 10_101, False),
        ("reserved", 10_000, 9_701, True),
        ("reserved", 10_000, 9_699, False),
        ("device", 100 << 30, 98 << 30, True),
        ("device", 1 << 30, (1 << 30) - DEVICE_BAR_BYTES, True),
        ("device", 1 << 30, (1 << 30) - DEVICE_BAR_BYTES - 1, False),
    ],
)
def test_what_counts_as_close(kind: str, measured_bytes: int, planned_bytes: int, close: bool) -> None:
    said = {"planned": {f"{kind}_bytes": planned_bytes}, "errors": {kind: planned_bytes / measured_bytes - 1}}
    assert is_close(kind, {f"{kind}_bytes": measured_bytes}, said) is close
