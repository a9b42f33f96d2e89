"""Nothing that comes with a model or with data is run: neither its Python files nor what a pickle names."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import build_tiny_llava
from tests.tiny_training import load_tiny, tiny_config

from eightgig import registry
from eightgig.cli.entry import run_command
from eightgig.core.errors import CheckpointError

SOURCE = Path(__file__).parents[2] / "src" / "eightgig"
OWN_CODE = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForImageTextToText": "modeling_own.OwnModel"}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once foreign code has run."""
    return tmp_path / "ran"


def bring_code(folder: Path, mark: Path, **config: Any) -> Path:
    """`folder` with Python files that its config names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": OWN_CODE}))
    for name in ("configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    return folder


class _Trap:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_a_model_that_needs_its_own_code_is_refused_and_its_user_told(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    bring_code(tmp_path / "own", mark, model_type="own_vl", architectures=["OwnModel"])
    assert run_command(["train", "--model", "./own", "--data", "train.jsonl", "--run-folder", "run"]) == 5
    err = capsys.readouterr().err
    assert "says model_type 'own_vl' and brings Python code of its own, which EightGig does not run" in err
    assert "choose a model of a supported family" in err
    assert not mark.exists()


def test_code_beside_a_known_model_is_left_alone(tmp_path: Path, mark: Path) -> None:
    folder = build_tiny_llava(tmp_path / "model", image_px=32)
    bring_code(folder, mark, **json.loads((folder / "config.json").read_text()))
    assert type(load_tiny(folder, tiny_config()).model).__module__.startswith("transformers.")
    assert not mark.exists()


@pytest.mark.parametrize("content", ["a call", "cut off"])
def test_weights_that_hold_a_call_are_refused(tmp_path: Path, mark: Path, content: str) -> None:
    folder = build_tiny_llava(tmp_path / "model", image_px=32)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if content == "a call":
        torch.save({**weights, "more": _Trap(mark)}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}")
    with pytest.raises(CheckpointError, match="something else than tensors") as caught:
        load_tiny(folder, tiny_config())
    assert "weights_only" not in str(caught.value)  # torch's advice: to have it run
    assert not mark.exists()


def test_plain_bin_weights_load_as_safetensors_do(tmp_path: Path) -> None:
    folder = build_tiny_llava(tmp_path / "model", image_px=32)
    whole = load_tiny(folder, tiny_config()).model.state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert registry.resolve(str(folder)).name
    again = load_tiny(folder, tiny_config()).model.state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(torch.as_tensor(again[name]), torch.as_tensor(whole[name])) for name in whole)


UNPICKLING = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.loads"}


def test_no_module_unpickles_or_trusts_remote_code() -> None:
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            named = {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func) in UNPICKLING or named & {"trust_remote_code", "allow_pickle", "weights_only"}:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert [line for line in found if "allow_pickle=False" not in line] == []
