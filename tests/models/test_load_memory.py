"""The script that measures what loading takes: written, loaded and stepped with a tiny model on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.load_memory import ALLOWED_BYTES, figures_of
from tests.tiny import build_tiny_llava


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_checkpoint_is_written_loaded_and_watched(tmp_path: Path) -> None:
    model = build_tiny_llava(tmp_path / "model", num_layers=4)
    command = [sys.executable, "-m", "benchmarks.load_memory", "--work", str(tmp_path / "work"), "--model", str(model)]
    command += ["--streamed", "3", "--device", "cpu", "--out", str(tmp_path / "record.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    record = json.loads((tmp_path / "record.json").read_text())
    figures = record["figures"]
    assert figures["num_samples"] > 0
    assert figures["anonymous_peak_bytes"] >= figures["anonymous_after_bytes"] > 50 * 2**20  # Python with torch
    weights_bytes = 3 * (4 * 64 * 64 + 3 * 64 * 128) * (1 / 2 + 1 / 64)
    table = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"] * 64 * 2  # bf16
    assert weights_bytes + table <= figures["by_design_bytes"] < weights_bytes + table + 3 * 14 * 512
    assert record["conditions"]["shard_bytes"] != []


def test_the_bar_is_on_what_lies_above_the_design() -> None:
    told = {"begin_s": 2.0, "end_s": 5.0, "before_bytes": 10, "after_bytes": 70, "streamed_bytes": 50, "table_bytes": 5}
    told |= {"gpu": {"loading": None, "step": None}, "num_tokens": 3}
    samples = [(1.0, 9 * ALLOWED_BYTES), (3.0, ALLOWED_BYTES + 55), (4.0, 60), (6.0, 9 * ALLOWED_BYTES)]
    figures = figures_of(told, samples)
    assert figures["above_design_bytes"] == ALLOWED_BYTES
    assert figures["within_bar"]
    assert not figures_of(told, [*samples, (4.5, ALLOWED_BYTES + 56)])["within_bar"]
