"""What the command line calls is what `app` offers: arguments fit the real functions, results the real types."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from cli_events import PLAN, RECEIPT, RECEIPT_ROWS, Calls, run, run_outcome

ROOT = Path(__file__).resolve().parents[2]
DEMO_OUTCOME = SimpleNamespace(
    before=0.1, after=0.9, num_images=200, adapter_folder="a", report_path="r", train_s=9, next_commands=("c",)
)
PREDICTION = SimpleNamespace(answer="7", model="m", adapter=None)


@pytest.mark.parametrize(
    ("module", "function", "result", "command"),
    [
        ("training", "train", run_outcome(Path("runs/a")), "train --dry-run"),
        ("training", "resume", run_outcome(Path("runs/a")), "train --resume runs/a"),
        ("prediction", "predict", PREDICTION, "predict runs/a --question q --image a.png"),
        ("reporting", "write_report", Path("r"), "report runs/a"),
        ("inspection", "inspect", SimpleNamespace(to_json=lambda: RECEIPT), "inspect llava-1.5-7b"),
        ("planning", "plan_as_json", PLAN, "plan llava-1.5-7b --gpu 4060"),
        ("planning", "compare_as_json", {"compare": {"full": PLAN}}, "plan llava-1.5-7b --compare"),
        ("demonstration", "run_demo", DEMO_OUTCOME, "demo"),
    ],
)
def test_each_verb_calls_its_function_as_it_is(
    module: str,
    function: str,
    result: Any,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = getattr(importlib.import_module(f"eightgig.app.{module}"), function)
    calls = Calls(monkeypatch)
    calls.answer(module, function, lambda **_: result)
    assert run(capsys, *command.split())[0] == 0
    named = dict(calls.arguments)
    inspect.signature(real).bind(*named.pop("positional"), **named)


def test_results_have_the_fields_that_are_printed() -> None:
    from eightgig.app.demonstration import DemoOutcome
    from eightgig.app.prediction import Prediction

    for real, stand_in in ((DemoOutcome, DEMO_OUTCOME), (Prediction, PREDICTION)):
        assert vars(stand_in).keys() <= {field.name for field in dataclasses.fields(real)}


def test_the_receipt_is_as_the_models_room_writes_it() -> None:
    from eightgig.models.receipt import Receipt, ReceiptRow

    assert {field.name for field in dataclasses.fields(ReceiptRow)} == RECEIPT_ROWS[0].keys()
    assert json.loads(json.dumps(Receipt.from_json(RECEIPT).to_json())) == RECEIPT


def test_the_readme_s_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from eightgig.app.training import train

    fake = create_autospec(train, return_value=run_outcome(Path("runs/a")))
    stand_in = ModuleType("eightgig.app.training")
    stand_in.train = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eightgig.app.training", stand_in)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert fake.call_args.args[0].training.max_steps == 100
    assert capsys.readouterr().out == f"{Path('runs/a/adapter')} {Path('runs/a/report.html')}\n"
