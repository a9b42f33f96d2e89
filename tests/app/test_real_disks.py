"""A disk that is full, and one that becomes read-only, not simulated: a small tmpfs that nobody else sees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eightgig.config import TrainingConfig, save_config

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
DISK_MIB = 16
SCRIPT = """
import json, subprocess, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from eightgig.app import finishing
from eightgig.app.training import resume, train
from eightgig.checkpoint.retention import checkpoint_paths
from eightgig.checkpoint.store import verify_checkpoint
from eightgig.config import load_config
from eightgig.core.errors import EightGigError
from eightgig.export.verify import Verification
from eightgig.train.events import SilentListener

finishing.verify_in_fresh_process = lambda plan, reference: Verification(0.0, 0.0, 0.0, None, ok=True, how="left out")
disk = Path(sys.argv[2])
filler = disk / "filler"

def call(*command):
    subprocess.run(command, check=True)

def make_read_only():
    # Mounted once more in its place: a disk with open files can't be made read-only itself.
    call("mount", "--bind", disk, disk)
    call("mount", "-o", "remount,bind,ro", disk)

def fill():
    with filler.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return

class At(SilentListener):
    def __init__(self, acts):
        self.acts, self.texts = acts, []
    def on_step(self, record):
        self.acts.get(record["step"], lambda: None)()
    def on_message(self, text):
        self.texts.append(text)

def state(run):
    for path in checkpoint_paths(run / "checkpoints"):
        verify_checkpoint(path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "saved": [path.name[-1] for path in checkpoint_paths(run / "checkpoints")],
        "logged": [record["step"] for record in records if record["kind"] == "step"],
        "losses": [record["loss"] for record in records if record["kind"] == "step"],
        "left": [path.name for path in run.rglob("*") if "partial" in path.name],
    }

def ends(config, run, listener):
    try:
        train(config, run_folder=run, listener=listener)
    except EightGigError as error:
        return str(error)
    return ""

call("mount", "-t", "tmpfs", "-o", f"size={sys.argv[3]}m", "tmpfs", disk)
config = load_config(Path(sys.argv[1])).config
found = {}

stopping = At({3: fill})
found["full"] = ends(config, disk / "full", stopping), state(disk / "full")
filler.unlink()
resume(disk / "full")
found["room again"] = state(disk / "full")

checkpoints = config.checkpoints.model_copy(update={"when_disk_is_full": "go_on"})
going_on = At({3: fill, 5: filler.unlink})
patient = type(config).model_validate(config.model_copy(update={"checkpoints": checkpoints}).model_dump())
found["go on"] = ends(patient, disk / "go-on", going_on), going_on.texts, state(disk / "go-on")

read_only = At({3: make_read_only})
found["read-only"] = ends(config, disk / "read-only", read_only), state(disk / "read-only")
call("umount", disk)
resume(disk / "read-only")
found["writable again"] = state(disk / "read-only")
print(json.dumps(found))
"""


def _has_namespaces() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _has_namespaces(), reason="no mount namespaces for this user")
def test_disks_that_are_full_or_read_only_in_the_middle_of_a_run(
    tiny_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    save_config(tiny_config(validation={"num_generated": 0}), tmp_path / "config.json")
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = [str(tmp_path / "config.json"), str(disk), str(DISK_MIB)]
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    error, full = found["full"]
    assert "full: " in error  # of the log or of the checkpoint: the last page of a file may have room for a line
    assert "free some space" in error
    assert full["saved"] == ["2"]
    whole = found["room again"]
    assert whole["logged"] == [1, 2, 3, 4, 5, 6]
    assert whole["saved"] == ["2", "4", "6"]

    error, texts, state = found["go on"]
    assert error == ""
    assert [text for text in texts if text.startswith("no checkpoint after step 4, going on without it")]
    assert state == whole | {"saved": ["2", "6"]}

    error, state = found["read-only"]
    assert "can't be written: Read-only file system" in error
    assert state["saved"] == ["2"]
    assert found["writable again"] == whole
    assert all(not item["left"] for item in (full, whole, state))
