"""README.md and README.zh-CN.md say the same: their commands, the figures and names in their tables, their outline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE_OR_NUMBER = re.compile(r"`[^`]+`|\d+(?:[.,]\d+)*")


def fenced_blocks(text: str) -> list[tuple[str, list[str]]]:
    """Language and lines of each fenced block; comments, which may be translated, and blank lines are left out."""
    return [(language, _without_comments(block)) for language, block in FENCE.findall(text)]


def table_rows(text: str) -> list[list[list[str]]]:
    """The code and numbers in each cell of each table row, in order; prose, which is translated, is left out."""
    prose = FENCE.sub("", text)
    rows = re.findall(r"^\|(.+)\|\s*$", prose, re.MULTILINE)
    return [[CODE_OR_NUMBER.findall(cell) for cell in row.split("|")] for row in rows]


def heading_levels(text: str) -> list[int]:
    """The level of each heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)]


def _without_comments(block: str) -> list[str]:
    lines = (re.sub(r"(^|\s+)#.*$", "", line).rstrip() for line in block.splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    return ENGLISH.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")


def test_the_commands_are_the_same(texts: tuple[str, str]) -> None:
    english, chinese = map(fenced_blocks, texts)
    assert english == chinese
    assert any("make demo" in lines for _, lines in english)


def test_the_tables_hold_the_same_figures_and_names(texts: tuple[str, str]) -> None:
    english, chinese = map(table_rows, texts)
    assert english == chinese
    assert any(cell for row in english for cell in row)


def test_the_outline_is_the_same(texts: tuple[str, str]) -> None:
    english, chinese = map(heading_levels, texts)
    assert english == chinese
    assert english[0] == 1


def test_each_points_to_the_other(texts: tuple[str, str]) -> None:
    english, chinese = texts
    assert f"({CHINESE.name})" in english
    assert f"({ENGLISH.name})" in chinese


def test_local_links_lead_somewhere(texts: tuple[str, str]) -> None:
    for text in texts:
        targets = re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", text))
        missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
        assert missing == []


def test_the_comparison_sees_a_changed_command_and_a_changed_figure() -> None:
    one = "# A\n```bash\nmake demo  # shows it\n```\n| card | GB |\n|---|---|\n| `x` | 8 |\n"
    same = "# 甲\n```bash\nmake demo  # 演示\n```\n| 显卡 | GB |\n|---|---|\n| `x` | 8 |\n"
    assert fenced_blocks(one) == fenced_blocks(same) == [("bash", ["make demo"])]
    assert table_rows(one) == table_rows(same)
    assert fenced_blocks(one) != fenced_blocks(same.replace("make demo", "make demo SEED=1"))
    assert table_rows(one) != table_rows(same.replace("| 8 |", "| 12 |"))
    assert table_rows(one) != table_rows(same.replace("`x`", "`y`"))
