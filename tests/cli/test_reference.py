"""The reference in docs is what the command line is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_has_not_drifted() -> None:
    specification = importlib.util.spec_from_file_location("cli_reference", ROOT / "scripts" / "cli_reference.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    kept = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert kept == script.render_reference(), "run `python scripts/cli_reference.py`"
    assert "| `--seed` | `0` |" in kept
    assert "eightgig train --resume runs/" in kept
