"""The crash harness itself, short: kills at chosen and at random moments, resumed each time, lose nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eightgig.config import TrainingConfig, save_config

ROOT = Path(__file__).parents[2]
NUM_KILLS = 5


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_run_killed_again_and_again_equals_one_left_alone(
    tiny_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    config = tiny_config(
        training={"max_steps": 30, "lora": {"rank": 4, "dropout": 0.2}},
        data={"num_workers": 1},
        checkpoints={"every_steps": 2, "keep_last": 2},
    )
    save_config(config, tmp_path / "config.json")
    command = [sys.executable, "-m", "benchmarks.crash_harness", "--kills", str(NUM_KILLS)]
    command += ["--config", str(tmp_path / "config.json"), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads((tmp_path / "o").read_text())["figures"]
    assert figures["num_kills"] == NUM_KILLS
    assert figures["num_kills_by_aim"] == {"file": 2, "loading": 1, "moment": 2}
    assert figures["differing"] == []
    assert figures["num_after_which_a_checkpoint_was_lost"] == 0
    assert figures["num_after_which_a_checkpoint_was_unreadable"] == 0
