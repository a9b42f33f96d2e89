"""The tables of the READMEs are what code and records say, and their commands are what the command line takes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmarks import planned_runs
from benchmarks.planned_comparison import comparison_row, figures_of
from cli_events import PLAN, RECEIPT, Calls, run, run_outcome

ROOT = Path(__file__).resolve().parents[2]
NUM_TABLES = {
    "README.md": 7,
    "README.zh-CN.md": 7,
    "docs/reference/plan_accuracy.md": 6,
    "docs/reference/cards.md": 2,
    "docs/reference/levers.md": 2,
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """scripts/readme_tables.py."""
    specification = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["readme_tables"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def record(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A record as `benchmarks/record.py` writes it."""
    return {"name": name, "date": "2026-11-24", "device": {"name": "NVIDIA X | Y"}, "figures": figures}


@pytest.mark.parametrize("name", NUM_TABLES)
def test_the_tables_have_not_drifted(name: str, tables: ModuleType) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == tables.fill(text, chinese=tables.PAGES[name]), "run `python scripts/readme_tables.py`"
    assert len(tables.MARKED.findall(text)) == NUM_TABLES[name]


def test_the_table_of_runs_under_a_cap(tables: ModuleType) -> None:
    plan = {
        "model": "m",
        "tokens": 1024,
        "cap_gib": 3.4,
        "levers": {"streamed_layers": 18},
        "reserved_bytes": 3 * 2**30,
    }
    measured = {"reserved_bytes": 2 * 2**30, "counted_bytes": 2**30, "moved_bytes": 2**20}
    ran = {"name": "a", "planned": plan, "step_s": 0.5, "tokens_per_s": 2048.4, **measured}
    cut_off = {"name": "b", "planned": plan, "error": "cut off"}
    peer = {"ok": True, "fw": "unsloth", "ckpt": "c", "seq": 12288, "cap": 7.25, "peak_reserved_GiB": 7.162}
    out = {"ok": False, "fw": "unsloth", "ckpt": "c"}
    rows = tables.capped_rows({"runs": [ran, cut_off], "peers": [{**peer, "step_s": 1.5129, "tok_s": 8122}, out]})
    assert rows[1:] == [
        [
            "`m`",
            "1,024",
            "3.4 GiB",
            "`streamed_layers=18`",
            "3.00 GiB",
            "2.00 GiB",
            "1.00 GiB",
            "0.50 s",
            "2,048",
            "1.00 MiB",
        ],
        ["Unsloth (`c`)", "12,288", "7.25 GiB", "", "", "7.16 GiB", "", "1.51 s", "8,122", ""],
    ]


def test_the_table_of_levers(tables: ModuleType) -> None:
    def row(lever: str, without: str | None, *, mib: int, saves_mib: int | None, ms: int, costs_ms: int | None) -> Any:
        return {
            "model": "m",
            "lever": lever,
            "without": without,
            "allocated_bytes": mib << 20,
            "step_s": ms / 1000,
            "saves_bytes": None if saves_mib is None else saves_mib << 20,
            "costs_s": None if costs_ms is None else costs_ms / 1000,
            "moved_bytes": 1 << 20,
        }

    measured = [
        row("plain", None, mib=900, saves_mib=None, ms=500, costs_ms=None),
        row("tiles", "plain", mib=600, saves_mib=300, ms=700, costs_ms=200),
        row("features", "plain", mib=1000, saves_mib=-100, ms=450, costs_ms=-50),
    ]
    _, *rows = tables.lever_rows([record("lever_prices", {"levers": measured})])
    assert rows == [
        ["`m`", "tiles", "plain", "300.00 MiB", "900.00 MiB", "+0.200 s", "0.500 s", "1.00 MiB"],
        ["`m`", "features", "plain", "-100.00 MiB", "900.00 MiB", "-0.050 s", "0.500 s", "1.00 MiB"],
    ]
    assert tables.lever_rows([]) == [["not measured yet"]]


def planned_run(name: str, part: str, *, measured_mib: int, before_mib: int | None, now_mib: int) -> dict[str, Any]:
    """A run of the record of planned runs, with the same size for each kind."""

    def sizes(mib: int) -> dict[str, int]:
        return {f"{kind}_bytes": mib << 20 for kind in ("allocated", "reserved", "device")}

    def said(mib: int) -> dict[str, Any]:
        return {**sizes(mib), "moment": "train", "planning_s": 1.0}

    settings = {"data.max_length": 2048, "training.method": "full", "hardware.gradient_checkpointing": False}
    of_run = {"name": name, "model": "m", "preset": None, "settings": settings, "mixes_lengths": True}
    before = None if before_mib is None else said(before_mib)
    return comparison_row({**of_run, "num_tokens": 2624, **said(now_mib)}, sizes(measured_mib), part, before)


def test_the_tables_of_planned_runs(tables: ModuleType) -> None:
    runs = [
        planned_run("blind-a", "blind_again", measured_mib=1000, before_mib=1040, now_mib=1005),
        planned_run("blind-b", "blind_again", measured_mib=10000, before_mib=10020, now_mib=10000),
        planned_run("c", "built", measured_mib=10000, before_mib=None, now_mib=9600),
        planned_run("d", "blind", measured_mib=10000, before_mib=10290, now_mib=10000),
    ]
    made = {"figures": figures_of(runs)}
    heading, *rows = tables.summary_rows(made)
    assert heading[1] == "allocated within 1 %"
    assert heading[5] == "device used within 3 % or 100 MiB"
    assert [row[1:] for row in rows] == [
        ["0/1", "`+2.90%`", "1/1", "`+2.90%`", "1/1", "`+2.90%`"],
        ["1/2", "`+4.00%`", "1/2", "`+4.00%`", "2/2", "`+4.00%`"],  # 40 MiB of device are within 100
        ["3/4", "`-4.00%`", "3/4", "`-4.00%`", "3/4", "`-4.00%`"],
    ]
    assert {cell for row in tables.summary_rows(made) for cell in row if cell[0].isalpha()} <= tables.CHINESE.keys()
    assert [row[-1] for row in tables.worst_rows(made)[1:]] == ["`d`"] * 3 + ["`blind-a`"] * 3 + ["`c`"] * 3
    blind = tables.blind_rows(made)
    assert set(blind[0]) <= tables.CHINESE.keys()
    assert blind[1] == ["`blind-a`", "2,624", *["1000.00 MiB", "`+4.00%`"] * 3]
    assert len(blind) == 3
    compared = tables.compared_rows(made, "blind_again")
    words = "2,048 text tokens, every weight, no checkpointing, texts of mixed lengths"
    sides = ["1000.00 MiB", "1005.00 MiB", "`+0.50%`", "`+4.00%`"]
    assert compared[1] == ["`blind-a`", "`m`", words, "2,624", *sides * 3]
    assert [len(row) for row in tables.compared_rows(made, "built")] == [13, 13]


def test_the_table_of_longest_texts(tables: ModuleType) -> None:
    ran = {"tokens": 2000, "ran": True, "ran_out_of_memory": False, "reserved_bytes": 3 << 30}
    runs = {"longest_run": ran, "longer_run": {"tokens": 2100, "ran": False, "ran_out_of_memory": True}}
    worse = {"longest_run": ran, "longer_run": {"tokens": 2100, "ran": False, "ran_out_of_memory": False}}
    pairs = [{"model": "m", "cap_gib": 7.25, **each} for each in (runs, worse)]
    heading, *rows = tables.longest_rows({"conditions": {"longer": 1.05}, "figures": {"pairs": pairs}})
    assert heading[4] == "text of 1.05 × that"
    assert rows[0] == ["`m`", "7.25 GiB", "2,000 tokens", "ran, 3.00 GiB reserved", "2,100 tokens", "ran out of memory"]
    assert rows[1][-1] == "failed"


def test_every_planned_setting_has_its_words(tables: ModuleType) -> None:
    paths = {
        path for run in (*planned_runs.BUILT, *planned_runs.BLIND, *planned_runs.BLIND_AGAIN) for path in run.settings
    }
    assert paths <= tables.SETTINGS.keys()


def test_a_record_becomes_rows_with_units(tables: ModuleType) -> None:
    rows = [
        {"seed": 0, "exact_match_before": 0.125, "exact_match_after": 0.945, "train_s": 222, "unknown": 1},
        {"seed": 1, "exact_match_after": 0.95, "host_peak_rss_bytes": 3 << 29, "tokens_per_s": 1234.5},
    ]
    flat = record("demo-cpu", {"seed": 2, "num_images": 1200})
    assert tables.record_rows([record("demo", {"rows": rows}), flat]) == [
        ["seed", "before", "after", "images", "training", "peak RAM", "speed", "device", "date"],
        ["0", "12.5 %", "94.5 %", "–", "3 min 42 s", "–", "–", "`NVIDIA X | Y`", "2026-11-24"],
        ["1", "–", "95 %", "–", "–", "1.50 GiB", "1,234 tokens/s", "`NVIDIA X | Y`", "2026-11-24"],
        ["2", "–", "–", "1,200", "–", "–", "–", "`NVIDIA X | Y`", "2026-11-24"],
    ]


def test_two_sides_of_a_comparison_become_two_rows(tables: ModuleType) -> None:
    figures = {
        "rounds": [{"eightgig": {"tokens_per_s": 9}}],
        "tokens_per_s": {"eightgig": 2000.4, "peer": 1900.0},
        "peak_reserved_gib": {"eightgig": 5.104, "peer": 6.5},
    }
    assert tables.record_rows([record("llava", figures)]) == [
        ["trainer", "peak reserved", "speed", "device", "date"],
        ["`eightgig`", "5.10 GiB", "2,000 tokens/s", "`NVIDIA X | Y`", "2026-11-24"],
        ["`peer`", "6.50 GiB", "1,900 tokens/s", "`NVIDIA X | Y`", "2026-11-24"],
    ]


def test_records_are_found_by_name(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("demo", "demo-gpu", "demonstration", "other"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(name, {"seed": 1})))
    assert sorted(found["name"] for found in tables.read_records("demo")) == ["demo", "demo-gpu"]
    text = "a\n<!-- table: nothing -->\nold\n<!-- end -->\nb\n<!-- table: other -->\n<!-- end -->\n"
    other = "|---|---|---|\n| 1 | `NVIDIA X | Y` | 2026-11-24 |\n"
    assert tables.fill(text, chinese=False) == (
        "a\n<!-- table: nothing -->\n*not measured yet*\n<!-- end -->\nb\n"
        f"<!-- table: other -->\n| seed | device | date |\n{other}<!-- end -->\n"
    )
    assert tables.fill(text, chinese=True) == (
        "a\n<!-- table: nothing -->\n*尚未测量*\n<!-- end -->\nb\n"
        f"<!-- table: other -->\n| 种子 | 设备 | 日期 |\n{other}<!-- end -->\n"
    )


def test_every_heading_has_its_chinese(tables: ModuleType) -> None:
    assert {column.heading for column in tables.COLUMNS} <= tables.CHINESE.keys()


def test_the_readme_s_commands_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls(monkeypatch)
    calls.answer("training", "train", lambda **_: run_outcome(tmp_path))
    calls.answer("reporting", "write_report", lambda: tmp_path)
    calls.answer("inspection", "inspect", lambda **_: SimpleNamespace(to_json=lambda: RECEIPT))
    calls.answer("planning", "plan_as_json", lambda **_: PLAN)
    calls.answer("prediction", "predict", lambda **_: SimpleNamespace(answer="a", model="m", adapter=None))
    (tmp_path / "my.yaml").write_text("preset: balanced\n")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block for language, block in BLOCK.findall(text) if language == "bash"]
    inline = re.findall(r"`(eightgig [^`]+)`", text)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("eightgig")] + inline
    assert len(commands) >= 6
    for command in commands:
        if "--resume" not in command:
            assert run(capsys, *shlex.split(command)[1:])[0] == 0, command


def test_the_readme_s_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake (\w+)", text)) <= set(targets)
