"""`inspect` and `report`: read off what is stored, against numbers counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from eightgig.app.inspection import inspect
from eightgig.app.reporting import write_report
from eightgig.config import TrainingConfig
from eightgig.core.errors import CheckpointError, UnsupportedModel
from eightgig.train.events import RunOutcome

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]

# Of the tiny LLaVA: q, k, v, o of 64 × 64 and gate, up, down of 64 × 128, twice.
NUM_LANGUAGE_PARAMETERS = 2 * (4 * 64 * 64 + 3 * 64 * 128)
BLOCK = 64  # weights that share an absmax


def _num_parameters_in(model: Path) -> int:
    """Counted from the header of the weights file, tied weights once."""
    total = 0
    with safe_open(model / "model.safetensors", framework="pt") as reader:
        for name in reader.keys():  # noqa: SIM118 - it is no mapping
            size = 1
            for side in reader.get_slice(name).get_shape():
                size *= side
            total += size
    return total


@pytest.mark.parametrize("random_weights_seed", [None, 0])
def test_a_model_is_measured_in_4_bits(tiny_model: Path, random_weights_seed: int | None) -> None:
    receipt = inspect(str(tiny_model), random_weights_seed=random_weights_seed)
    rows = {row.group: row for row in receipt.rows}
    assert [row.group for row in receipt.rows if row.is_4bit] == ["language linears"]
    language = rows["language linears"]
    assert language.num_parameters == NUM_LANGUAGE_PARAMETERS
    assert language.bytes_16bit == 2 * NUM_LANGUAGE_PARAMETERS
    half_bytes, absmax_bytes = NUM_LANGUAGE_PARAMETERS // 2, NUM_LANGUAGE_PARAMETERS // BLOCK
    assert language.bytes_now >= half_bytes + absmax_bytes  # double quantisation: a byte a block, and tables
    assert receipt.num_parameters == _num_parameters_in(tiny_model)
    assert receipt.mismatches == ()


def test_a_run_shows_the_receipt_that_it_wrote(tiny_config: Config, run_training: Train) -> None:
    outcome = run_training(tiny_config(), dry_run=True)
    stored = json.loads((outcome.run_folder / "receipt.json").read_text())
    receipt = inspect(str(outcome.run_folder))
    assert json.loads(json.dumps(receipt.to_json())) == stored
    assert {row.group for row in receipt.rows if row.num_trainable} == {"adapters"}


def test_a_run_without_a_receipt_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text('{"status": "failed"}')
    with pytest.raises(CheckpointError, match="has no receipt"):
        inspect(str(tmp_path))
    (tmp_path / "run.json").unlink()
    with pytest.raises(UnsupportedModel, match="model_type None"):
        inspect(str(tmp_path))


def test_a_report_shows_what_there_is_and_is_written_over(tiny_config: Config, run_training: Train) -> None:
    folder = run_training(tiny_config(), dry_run=True).run_folder
    path = write_report(folder)
    assert path == folder / "report.html"
    before = path.read_text()
    assert "language linears" in before
    assert "0.123" not in before
    step = {"kind": "step", "step": 1, "epoch": 0.1, "loss": 0.123, "learning_rate": 1e-3, "grad_norm": 1.0}
    step |= {"skipped": False, "num_target_tokens": 3, "num_tokens": 9, "num_images": 1, "step_s": 0.5}
    step |= {"data_wait_s": 0.1, "tokens_per_s": 18.0, "images_per_s": 2.0, "memory_now_bytes": 1}
    step |= {"memory_peak_bytes": 1, "memory_reserved_peak_bytes": 1}
    with (folder / "metrics.jsonl").open("w") as stream:
        stream.write(json.dumps(step) + "\n" + '{"kind": "st')  # a run that is being killed right now
    after = write_report(folder).read_text()
    assert "0.123" in after
    assert "cut off in writing" in after


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
