"""The scripts that measure the memory levers on a GPU: their logic, on a tiny model on the CPU."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import lever_numerics, lever_prices, lever_training, levers_8gb
from benchmarks.lever_numerics import compared, numbers_of, run_of
from benchmarks.lever_runs import LeverRun, measure
from benchmarks.levers_8gb import bars
from tests.tiny import build_tiny_llava

from eightgig.config.loading import load_config
from eightgig.memory import layer_inputs

CPU = torch.device("cpu")
NUM_LAYERS, HIDDEN = 6, 64
TOKENS = 96  # 16 of them of the picture


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        build_tiny_llava(tmp_path_factory.mktemp("lever-benchmarks") / "model", image_px=32, num_layers=NUM_LAYERS)
    )


def test_levers_change_no_loss_and_what_they_move_is_counted(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    plain = LeverRun("plain", tiny, TOKENS, num_steps=4, precision="fp32")
    levers = {
        "streamed_layers": 4,
        "embedding_on_host": True,
        "cache_image_features": True,
        "offload_layer_inputs": True,
        "mlp_tile_tokens": 29,
        "tiled_projections": True,
        "loss_chunk_tokens": 7,
    }
    without, with_levers = measure(plain, CPU), measure(replace(plain, levers=levers), CPU)
    assert with_levers["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert without["losses"][-1] < without["losses"][0]
    assert without["num_tokens"] == TOKENS
    assert without["num_steps"] == 4
    row_bytes = TOKENS * HIDDEN * 4
    of_inputs = 2 * (NUM_LAYERS - 1) * row_bytes  # there and back, the last one stays
    of_embeddings = row_bytes + TOKENS * 8
    layer_weights = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 2 * HIDDEN
    of_layer = layer_weights // 2 + 7 * 512  # each linear's scales fill up to 512 bytes
    of_streamed = 2 * (4 - 2) * of_layer
    of_batch = 3 * TOKENS * 8 + 17 * HIDDEN * 4  # ids, mask, labels; the tower's rows, its class token among them
    assert with_levers["moved_bytes"] == of_inputs + of_embeddings + of_streamed + of_batch
    assert without["moved_bytes"] == 3 * TOKENS * 8 + 3 * 32 * 32 * 4


def ran(name: str, **figures: Any) -> dict[str, Any]:
    row = {"name": name, "planned": {"cap_gib": 7.25}, "num_steps": 6, "losses": [9.0, 8.0], "step_s": 0.5}
    row |= {"counted_bytes": 7 << 30, "pinned_bytes": 7 << 30, "tokens_per_s": 1000.0}
    return row | {"phases": {"train": {"reserved_bytes": 4 << 30}}} | figures


def test_bars_are_told_from_what_ran() -> None:
    peers = {
        ("unsloth-llava-7b", 1024): {"step_s": 0.4, "peak_reserved_GiB": 4.5},
        ("unsloth-llava-7b", 12288): {"tok_s": 2000.0},
    }
    runs = {row["name"]: row for row in (ran("llava-7b-1024"), ran("llava-7b-24576"))}
    told = bars(runs, peers)
    assert told["1 llava-7b-1024"]["holds"]
    assert told["2 llava-7b-24576"]["holds"]
    assert told.keys() == {"1 llava-7b-1024", "2 llava-7b-24576"}
    for worse in ({"step_s": 0.51}, {"phases": {"train": {"reserved_bytes": 5 << 30}}}):
        assert not bars({"llava-7b-1024": ran("llava-7b-1024", **worse)}, peers)["1 llava-7b-1024"]["holds"]
    for worse in (
        {"tokens_per_s": 999.0},
        {"num_steps": 4},
        {"counted_bytes": 8 << 30},
        {"pinned_bytes": (7 << 30) + 1},
    ):
        assert not bars({"llava-7b-24576": ran("llava-7b-24576", **worse)}, peers)["2 llava-7b-24576"]["holds"]
    assert bars({"llava-7b-24576": {"name": "llava-7b-24576", "out_of_memory": True}}, peers) == {}


def test_a_record_keeps_what_earlier_calls_measured(tmp_path: Path) -> None:
    plans = {
        name: {"name": name, "cap_gib": 7.25, "allocated_bytes": 90, "reserved_bytes": 3, "device_bytes": 3}
        for name in ("qwen-vl-chat-1024", "llava-13b-2048")
    }
    path = tmp_path / "record.json"
    levers_8gb.Record(path, plans).add_run(ran("qwen-vl-chat-1024", allocated_bytes=100))
    levers_8gb.Record(path, plans).add_run({"name": "llava-13b-2048", "out_of_memory": True})
    record = levers_8gb.Record(path, plans)
    assert list(record.runs) == ["qwen-vl-chat-1024", "llava-13b-2048"]
    assert record.runs["qwen-vl-chat-1024"]["planned_errors"] == pytest.approx({"allocated_bytes": -0.1})


def test_numbers_of_each_lever_are_those_of_the_plain_path(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    fewer = {name: dict(settings) for name, settings in lever_numerics.LEVERS.items() if name != "paged-8bit"}
    for settings in fewer.values():  # for a model of six layers and a short row
        for name, value in {"streamed_layers": 4, "checkpointed_layers": 2, "mlp_tile_tokens": 30}.items():
            if name in settings:
                settings[name] = value
    monkeypatch.setattr(lever_numerics, "LEVERS", fewer)
    found = {
        name: numbers_of(run_of(name, tiny, TOKENS, precision="fp32", num_steps=2), CPU)
        for name in ("plain", "half-checkpointed", "offload", "tiles", "projections", "all")
    }
    plain = found["plain"]
    assert bool(plain["gradient"].any())
    assert plain["token_losses"].numel() > TOKENS / 2
    assert float(plain["token_losses"].mean()) == pytest.approx(float(plain["curve"][0]), rel=1e-5)
    for name, numbers in found.items():
        errors = compared(numbers, plain)["errors"]
        assert max(errors.values()) < 1e-5, name
    wrong = {**plain, "gradient": plain["gradient"] * 1.04}
    assert compared(wrong, plain)["holds"] == {"token_losses": True, "gradient": False, "curve": True}


def test_prices_are_differences_to_the_run_without(tiny: str) -> None:
    written: list[list[dict[str, Any]]] = []
    base = LeverRun("plain", tiny, TOKENS, precision="fp32")
    lever_prices.measure_model(base, CPU, num_rounds=1, num_steps=2, write=written.append)
    assert len(written) == 1
    rows = {row["lever"]: row for row in written[-1]}
    plain = rows["plain"]
    assert plain["saves_bytes"] is None
    offload = rows["layer inputs on the host"]
    assert offload["without"] == "all layers checkpointed"
    assert math.isclose(offload["costs_s"], offload["step_s"] - rows["all layers checkpointed"]["step_s"])
    assert all(len(times) == 2 for row in rows.values() for times in row["times_s"])
    assert rows["weights of all layers in RAM"]["moved_bytes"] > 2 * plain["moved_bytes"]


TRAINING = """
import json, pathlib, sys, time
resumed = sys.argv[1] == "--resume"
folder = pathlib.Path(sys.argv[2] if resumed else sys.argv[3])
folder.mkdir(exist_ok=True)
steps = [{"kind": "step", "step": i, "loss": 9 - i / 8, "num_tokens": 96, "skipped": False} for i in range(1, 21)]
done = len((folder / "metrics.jsonl").read_text().splitlines()) if resumed else 0
status = "interrupted"
try:
    for step in steps[done:]:
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(step) + "\\n")
        time.sleep(0 if resumed else 0.5)
    status = "finished"
    (folder / "memory.json").write_text("{}")
    (folder / "verification.json").write_text(json.dumps({"ok": True, "relative_difference": 0.0}))
except KeyboardInterrupt:
    pass
(folder / "run.json").write_text(json.dumps({"status": status}))
"""
"""What stands in for `eightgig train`: it takes steps, can be interrupted, and goes on."""


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Processes that are started inside can be interrupted, even where these tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_a_run_is_interrupted_and_resumed(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(lever_training, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(lever_training, "INTERRUPTED_BEHIND", 4)
    run = LeverRun("tiny", tiny, TOKENS, {"embedding_on_host": True}, precision="fp32")
    row = lever_training.measure(run, tmp_path, time.monotonic() + 60, "cpu")
    assert "error" not in row, row
    assert row["steps"] == list(range(1, 21))
    assert row["falls"]
    config = load_config(tmp_path / "tiny.yaml").config
    assert config.hardware.embedding_on_host
    assert config.validation.every_steps == config.checkpoints.every_steps == 2
    answers = [json.loads(line)["answer"] for line in config.data.data_path.read_text().splitlines()]
    assert len(set(answers)) == 2
    assert all(len(answer.split()) == TOKENS - 16 for answer in answers)


def test_a_run_that_is_not_interrupted_is_an_error(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "training.py"
    script.write_text("raise SystemExit('no room')")
    monkeypatch.setattr(lever_training, "COMMAND", (sys.executable, str(script)))
    row = lever_training.measure(LeverRun("tiny", tiny, TOKENS), tmp_path, time.monotonic() + 60, "cpu")
    assert "no room" in row["error"]
