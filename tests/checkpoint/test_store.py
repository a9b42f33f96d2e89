"""Checkpoints appear whole, are checked when read, and the right ones stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from eightgig.checkpoint.retention import checkpoint_paths, newest_sound_checkpoint, prune, read_best, record_best
from eightgig.checkpoint.store import checkpoint_bytes, read_checkpoint, verify_checkpoint, write_checkpoint
from eightgig.core.errors import CheckpointError

FINGERPRINT = {"config": "a", "data": "b"}


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def _write(folder: Path, step: int, seed: int = 0) -> Path:
    state = {"optimizer": {"lr": 0.1, "momentum": torch.arange(3.0)}}
    return write_checkpoint(folder, step=step, model=_model(seed), state=state, fingerprint=FINGERPRINT)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = _write(tmp_path, 7, seed=1)
    model = _model(seed=2)
    checkpoint = read_checkpoint(path, model, fingerprint=FINGERPRINT)
    assert checkpoint.step == 7
    assert torch.equal(checkpoint.state["optimizer"]["momentum"], torch.arange(3.0))
    assert torch.equal(model.weight, _model(seed=1).weight)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "trainable.safetensors"])
def test_an_altered_byte_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"the content of {name} was altered"):
        verify_checkpoint(path)


def test_a_truncated_or_missing_file_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, 1)
    state = path / "state.json"
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"state.json has {len(content) - 1} bytes instead of {len(content)}"):
        verify_checkpoint(path)
    state.unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        verify_checkpoint(path)


def test_another_config_or_data_set_is_refused_by_name(tmp_path: Path) -> None:
    path = _write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="written with another data"):
        read_checkpoint(path, _model(0), fingerprint={"config": "a", "data": "changed"})


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, step=1, model=_model(0), state={"x": object()}, fingerprint=FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_the_last_few_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in [(1, 0.9), (2, 0.4), (3, 0.6), (4, 0.7), (5, 0.5)]:
        record_best(tmp_path, step=step, loss=loss)
        _write(tmp_path, step)
        prune(tmp_path, keep_last=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert read_best(tmp_path) == {"step": 2, "loss": 0.4}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_damaged_newest_checkpoint_is_skipped_and_said(tmp_path: Path) -> None:
    sound = _write(tmp_path, 1)
    damaged = _write(tmp_path, 2)
    (damaged / "state.json").unlink()
    said: list[str] = []
    assert newest_sound_checkpoint(tmp_path, said.append) == sound
    assert len(said) == 1
    assert "step-00000002 is damaged: state.json is missing" in said[0]


NO_MANIFEST = ["", "7", "[]", "null", '{"files": 3}', '{"format_version": 2}', '{"format_version": 2, "files": [1]}']


@pytest.mark.parametrize("content", NO_MANIFEST)
def test_a_manifest_that_is_none_gives_way_to_the_checkpoint_before(tmp_path: Path, content: str) -> None:
    sound = _write(tmp_path, 1)
    (_write(tmp_path, 2) / "manifest.json").write_text(content)
    said: list[str] = []
    assert newest_sound_checkpoint(tmp_path, said.append) == sound
    assert "step-00000002 is damaged" in said[0]


@pytest.mark.parametrize(
    ("name", "value"), [("step", 1), ("fingerprint", {}), ("details", {"a": {}}), ("files", {}), ("more", 1)]
)
def test_an_altered_manifest_is_found(tmp_path: Path, name: str, value: object) -> None:
    """All of it still has the right shape: only its own hash tells."""
    path = _write(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    assert verify_checkpoint(path)["step"] == 2
    (path / "manifest.json").write_text(json.dumps(manifest | {name: value}))
    with pytest.raises(CheckpointError, match=r"the content of manifest\.json was altered"):
        verify_checkpoint(path)


def test_an_empty_folder_gives_way_to_the_checkpoint_before(tmp_path: Path) -> None:
    sound = _write(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    assert newest_sound_checkpoint(tmp_path, print) == sound


def test_what_changed_is_named_as_far_as_the_details_tell(tmp_path: Path) -> None:
    before = {"config": {"lr": 0.1, "rank": 8, "gone": None}, "data": {"a.jsonl": "1"}}
    path = write_checkpoint(tmp_path, step=1, model=_model(0), state={}, fingerprint=FINGERPRINT, details=before)
    now = {"config": {"lr": 0.2, "rank": 8, "new": 1}, "data": {"a.jsonl": "2"}}
    said = r"written with another config: gone is gone, lr is 0\.2, was 0\.1, new is new"
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(path, _model(0), fingerprint=FINGERPRINT | {"config": "c"}, details=now)
    harmless = read_checkpoint(path, _model(0), fingerprint=FINGERPRINT, details=before | {"data": {"a.jsonl": "2"}})
    assert harmless.changes == ("a.jsonl is 2, was 1",)


def test_of_many_changes_the_first_are_named(tmp_path: Path) -> None:
    before = {"config": {str(i): i for i in range(9)}}
    path = write_checkpoint(tmp_path, step=1, model=_model(0), state={}, fingerprint=FINGERPRINT, details=before)
    with pytest.raises(CheckpointError, match="4 is gone, and 4 more\n"):
        read_checkpoint(path, _model(0), fingerprint=FINGERPRINT | {"config": "c"}, details={"config": {}})


def test_the_size_told_is_that_of_the_files(tmp_path: Path) -> None:
    model, state = (
        nn.Linear(400, 300),
        {"optimizer": {"state": {0: {"a": torch.zeros(300, 400), "b": [torch.ones(9)]}}}},
    )
    path = write_checkpoint(tmp_path, step=1, model=model, state=state, fingerprint=FINGERPRINT)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert 0 < written - checkpoint_bytes(model, state) < 4096


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99"):
        verify_checkpoint(path)


def test_no_checkpoint_at_all_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no usable checkpoint"):
        newest_sound_checkpoint(tmp_path, print)
