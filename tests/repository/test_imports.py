"""Who may import whom, and what must stay light: `--help` and settings never wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
ROOMS = [room.strip() for layer in CONTRACT["layers"] for room in layer.split("|")]
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "torchvision"]


def _modules_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("room", ["core", "config", "registry", "cli"])
def test_the_light_rooms_load_without_torch(room: str) -> None:
    loaded = _modules_after(f"import eightgig.{room}")
    assert f"eightgig.{room}" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_help_loads_without_torch() -> None:
    loaded = _modules_after("from eightgig.cli.entry import run_command; assert run_command(['--help']) == 0")
    assert loaded.isdisjoint(HEAVY)


def test_the_check_of_light_rooms_would_see_torch() -> None:
    assert "torch" in _modules_after("import eightgig.step.loss")


def test_no_room_imports_a_higher_one() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_the_architecture_page_names_every_room_of_the_contract() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [room for room in ROOMS if f"| `{room}` |" not in text]
    assert missing == []
    present = {path.name for path in (ROOT / "src" / "eightgig").iterdir() if (path / "__init__.py").exists()}
    assert present == set(ROOMS)
