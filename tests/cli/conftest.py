"""Lets the tests of this folder import the module beside them, and gives them a stand-in for `app`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that no log lands in the checkout."""
    monkeypatch.chdir(tmp_path)
