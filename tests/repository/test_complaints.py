"""The table of complaints: all 41 of them, each with tests that exist, or with an honest "not yet"."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUM_COMPLAINTS = 41
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

ROWS = ROW.findall((ROOT / "docs" / "reference" / "complaints.md").read_text(encoding="utf-8"))


def test_every_complaint_has_its_row() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, NUM_COMPLAINTS + 1))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_a_row_names_exists(row: tuple[str, str, str, str]) -> None:
    _, _, here, shown_by = row
    named = TEST.findall(shown_by)
    assert named or ("not yet" in here and shown_by == "–")
    assert "".join(f"`{path}::{name}`" for path, name in named) == shown_by.replace(" ", "").replace("–", "")
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
