"""The least memory of a run beside what full-size runs on a GPU took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightgig import registry
from eightgig.config import ConfigPresets
from eightgig.core.units import GIB
from eightgig.models.least_memory import CONTEXT_BYTES, RANK, least_memory

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "full_size.json"
RUNS = [run for run in json.loads(RECORD.read_text())["figures"]["runs"] if run["precision"] == "bf16"]


@pytest.mark.parametrize("run", RUNS, ids=[run["model"] for run in RUNS])
def test_it_is_what_a_real_run_held_without_its_activations(run: dict[str, Any]) -> None:
    least, measured = least_memory(registry.get(run["model"]), RANK), run["categories"]
    assert least.weights_bytes == pytest.approx(measured["4-bit weights"] + measured["16-bit weights"], rel=5e-4)
    trained = measured["adapters"] + measured["gradients"] + measured["optimizer"]
    assert least.adapters_bytes == pytest.approx(trained, rel=0.01)
    assert least.total_bytes < run["device_used_gib"] * GIB


def test_the_rank_is_that_of_the_smallest_preset() -> None:
    lora = ConfigPresets.ultra_low_memory().training.lora
    assert lora is not None
    assert lora.rank == RANK


def test_the_context_is_the_recorded_one() -> None:
    assert {run["categories"]["CUDA context"] for run in RUNS} == {CONTEXT_BYTES}
