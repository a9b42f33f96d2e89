"""`predict`, `report`, `inspect` and `demo`: what `app` is given, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_events import RECEIPT, Calls, run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A stand-in for `app`."""
    return Calls(monkeypatch)


def test_predict_prints_the_answer_alone(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.answer("prediction", "predict", lambda **_: SimpleNamespace(answer="7 [bars]", model="m", adapter=None))
    arguments = ["runs/a", "--image", "a.png", "--image", "b.png", "--question", "How many?", "--max-new-tokens", "9"]
    assert run(capsys, "predict", *arguments) == (0, "7 [bars]\n", "")
    assert calls.arguments == {
        "positional": (),
        "question": "How many?",
        "images": [Path("a.png"), Path("b.png")],
        "run": Path("runs/a"),
        "model": None,
        "max_new_tokens": 9,
    }


def test_predict_as_json(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    prediction = SimpleNamespace(answer="七", model="eightgig-demo", adapter=Path("runs/a/adapter"))
    calls.answer("prediction", "predict", lambda **_: prediction)
    code, out, _ = run(capsys, "predict", "--model", "eightgig-demo", "--question", "多少?", "--json")
    assert code == 0
    assert json.loads(out) == {
        "question": "多少?",
        "answer": "七",
        "model": "eightgig-demo",
        "adapter": str(Path("runs/a/adapter")),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--question", "q"], "give the folder of a RUN, or --model NAME"),
        (["runs/a"], "Missing option '--question'"),
        (["runs/a", "--question", "q", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_predict_without_what_it_needs(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "predict", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_report_prints_the_path(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.answer("reporting", "write_report", lambda: Path("runs/a/report.html"))
    assert run(capsys, "report", "runs/a") == (0, f"{Path('runs/a/report.html')}\n", "")
    assert calls.arguments["positional"] == (Path("runs/a"),)


def test_inspect_prints_the_receipt(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.answer("inspection", "inspect", lambda **_: SimpleNamespace(to_json=lambda: RECEIPT))
    assert run(capsys, "inspect", "llava-1.5-7b", "--random-weights", "0") == (
        0,
        "llava-1.5-7b, asked for nf4 with double quantisation in the language model's\n"
        "linear layers, 16-bit elsewhere\n"
        "part              parameters  stored as  4-bit  at 16 bits         now\n"
        "language linears      6.48 B  uint8      yes     12.06 GiB    3.11 GiB\n"
        "vision tower           304 M  bfloat16   no     578.89 MiB  578.89 MiB\n"
        "total                 6.78 B                     12.63 GiB    3.68 GiB\n",
        "",
    )
    assert calls.arguments == {"positional": ("llava-1.5-7b",), "random_weights_seed": 0}


def test_inspect_says_what_a_tower_in_4_bits_changes(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    difference = {"num_images": 8, "mean_relative_error": 0.0312, "worst_relative_error": 0.047}
    told = RECEIPT | {"tower_difference": difference | {"mean_cosine": 0.99951, "worst_cosine": 0.99889}}
    calls.answer("inspection", "inspect", lambda **_: SimpleNamespace(to_json=lambda: told))
    _, out, _ = run(capsys, "inspect", "runs/a")
    assert out.endswith(
        "The vision tower is in 4 bits: over 8 images of the data its features differ\n"
        "from those in 16 bits by 3.12 % on average and 4.70 % at worst; their cosine is\n"
        "0.9995 on average and 0.9989 at worst.\n"
    )


def test_inspect_as_json(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.answer("inspection", "inspect", lambda **_: SimpleNamespace(to_json=lambda: RECEIPT))
    assert json.loads(run(capsys, "inspect", "runs/a", "--json")[1]) == RECEIPT


@pytest.mark.parametrize(("is_on_path", "program"), [(True, "eightgig"), (False, ".venv/bin/eightgig")])
def test_demo_ends_with_the_gain_and_the_next_commands(
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_on_path: bool,
    program: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if is_on_path else None)
    monkeypatch.setattr("sys.argv", [".venv/bin/eightgig", "demo"])
    outcome = SimpleNamespace(
        before=0.125,
        after=0.945,
        num_images=200,
        adapter_folder=Path("d/adapter"),
        report_path=Path("d/report.html"),
        train_s=222,
        next_commands=("eightgig train --data [my].jsonl", "eightgig report d"),
    )
    calls.answer("demonstration", "run_demo", lambda **_: outcome)
    assert run(capsys, "demo", "--output-dir", "d", "--seed", "2") == (
        0,
        "exact match   12.5 % before, 94.5 % after training, on 200 held-out images\n"
        "training      3 min 42 s\n"
        f"adapter       {Path('d/adapter')}\n"
        f"report        {Path('d/report.html')}\n"
        "\nnext, with your own data:\n"
        f"  {program} train --data [my].jsonl\n"
        f"  {program} report d\n",
        "",
    )
    assert (calls.arguments["output_dir"], calls.arguments["seed"]) == (Path("d"), 2)
