"""What a release is made of: changelog, version, the tested set, licence, scripts."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eightgig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PINS = {canonicalize_name(name): version for name, version in PINS.items()}
REQUIRED = [Requirement(text) for text in (*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"])]


def test_the_changelog_speaks_of_what_is_not_released_or_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## \[([^\]]+)\].*?\n(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL))
    entries = [sections.get(name, "") for name in ("Unreleased", eightgig.__version__)]
    assert any(re.search(r"^- \S", entry, re.MULTILINE) for entry in entries)


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_the_tested_set_lies_within_the_ranges(requirement: Requirement) -> None:
    version = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("requirement", REQUIRED[: len(PROJECT["project"]["dependencies"])], ids=str)
def test_what_is_installed_lies_within_the_ranges(requirement: Requirement) -> None:
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)


def test_no_cuda_package_is_pinned() -> None:
    driver_interface = "nvidia-ml-py"  # pure Python, beside the driver
    assert not [name for name in PINS if name.startswith(("nvidia", "cuda", "triton")) and name != driver_interface]
    assert "+" not in "".join(PINS.values())


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("name", ["scripts/set_up.sh", "scripts/install_torch.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    done = subprocess.run(["bash", "-n", ROOT / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in (ROOT / name).read_text()


def test_a_machine_without_a_new_enough_python_is_told_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "set_up.sh", tmp_path / "venv"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"no Python 3.11 or newer with the modules venv and ensurepip (tried {old})" in done.stderr
    assert "make test PYTHON=/path/to/python" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def bare_clone(tmp_path: Path) -> Path:
    """The set-up files alone, with a stand-in python that writes down how pip is called."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "install_torch.sh").write_bytes((ROOT / "scripts" / "install_torch.sh").read_bytes())
    (tmp_path / "scripts" / "install_torch.sh").chmod(0o755)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    return tmp_path


def _install_torch(clone: Path, python: str, *, with_gpu: bool) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run install_torch.sh with a stand-in python (a shell script); what it printed, and the calls of pip install."""
    (clone / "venv" / "bin" / "python").write_text(f'#!/bin/sh\necho "$@" >> "{clone}/calls"\n{python}\n')
    (clone / "venv" / "bin" / "python").chmod(0o755)
    (clone / "bin").mkdir()
    (clone / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if with_gpu else 9}\n")
    (clone / "bin" / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        [clone / "scripts" / "install_torch.sh", "venv"],
        cwd=clone,
        env={**os.environ, "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = [line for line in (clone / "calls").read_text().splitlines() if " install " in line]
    return done, calls


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only Linux has a separate CPU build")
class TestTorchBuild:
    def test_with_a_gpu_the_default_build_is_installed(self, bare_clone: Path) -> None:
        done, calls = _install_torch(bare_clone, "exit 0", with_gpu=True)
        assert done.returncode == 0, done.stderr
        assert len(calls) == 1
        assert calls[0].endswith("torch==2.13.0")

    def test_without_a_gpu_the_cpu_build_is_installed(self, bare_clone: Path) -> None:
        done, calls = _install_torch(bare_clone, "exit 0", with_gpu=False)
        assert done.returncode == 0, done.stderr
        assert len(calls) == 1
        assert calls[0].endswith("torch==2.13.0+cpu")

    def test_pytorchs_own_wheels_are_next_and_the_default_build_last(self, bare_clone: Path) -> None:
        done, calls = _install_torch(bare_clone, 'case "$*" in *+cpu) exit 1;; esac', with_gpu=False)
        assert done.returncode == 0, done.stderr
        assert [call.split()[-1] for call in calls] == ["torch==2.13.0+cpu", "torch==2.13.0+cpu", "torch==2.13.0"]
        assert "--index-url" in calls[1]
        assert "out of reach" in done.stderr

    def test_what_is_installed_already_is_left_alone(self, bare_clone: Path) -> None:
        done, calls = _install_torch(bare_clone, "echo 2.13.0+cpu", with_gpu=False)
        assert done.returncode == 0, done.stderr
        assert calls == []

    def test_a_failure_of_every_way_is_a_failure(self, bare_clone: Path) -> None:
        done, calls = _install_torch(bare_clone, "exit 1", with_gpu=False)
        assert done.returncode != 0
        assert len(calls) == 3
