"""`plan`: what `app` is given, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_events import ALTERNATIVE, PLAN, Calls, run
from hypothesis import given
from hypothesis import strategies as st

from eightgig.app.card_wanted import CardWanted
from eightgig.cli.plan_lines import compare_lines, plan_lines
from eightgig.config import TrainingConfig, TrainingMethod, load_config
from eightgig.core.errors import UnsupportedModel

WITHOUT_DATA = PLAN | {"workload": PLAN["workload"] | {"data": None}, "levers": [], "time": None}
SIZES = st.integers(1, 80 << 30)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A stand-in for the planner."""
    made = Calls(monkeypatch)
    made.answer("planning", "plan_as_json", lambda **_: PLAN)
    return made


def config_given(calls: Calls) -> TrainingConfig:
    config = calls.arguments["positional"][0]
    assert isinstance(config, TrainingConfig)
    return config


def test_a_plan_says_where_the_memory_goes_and_what_it_takes() -> None:
    assert list(plan_lines(PLAN)) == [
        "m, QLoRA",
        "1 sample at once: 1,088 tokens, 512 of text and 576 of images",
        "decided by the most tokens: chart-17 (train.jsonl:18)",
        "data: 950 training and 50 validation samples, 30 steps an epoch; 701 tokens a",
        "  sample in the mean, 1,088 at most",
        "note: pictures were measured by their headers; training decodes every one before",
        "  it begins",
        "",
        f"4-bit weights                6.00 GiB  {'█' * 32}     │",
        f"CUDA context               512.00 MiB  {' ' * 32}██   │",
        f"on the card at most          6.50 GiB  {'█' * 34}   │",
        f"for this run                 7.00 GiB  {' ' * 37}│",
        "",
        "at the peak (train) PyTorch allocates 5.00 GiB and reserves 6.00 GiB",
        "on the card in each phase: load 5.00 GiB, validate 6.00 GiB, train 6.50 GiB,",
        "  save 6.50 GiB",
        "",
        "chosen for this card:",
        "  chunked loss: saves 1.00 GiB, costs 0.1 s a step; the logits would not fit",
        "",
        "estimated time: 9.5 s a step, 4 min 45 s an epoch, 2,362 tokens/s (estimated",
        "  from the card's data sheet)",
        "fits: RTX 4060, 7.00 GiB of it for this run",
    ]


def test_what_does_not_fit_goes_beyond_the_budget() -> None:
    lines = list(plan_lines(WITHOUT_DATA | {"fits": False, "budget_bytes": 13 << 28}))
    half = 18  # of the 37 columns that the whole bar takes
    assert f"4-bit weights                6.00 GiB  {'█' * half}│{'█' * 15}" in lines
    assert lines[-1] == "does not fit: RTX 4060, 3.25 GiB of it for this run"


def test_what_would_fit_instead_is_said_with_its_price() -> None:
    unfit = WITHOUT_DATA | {"fits": False, "budget_bytes": 13 << 28}
    lines = list(plan_lines(unfit | {"alternatives": [ALTERNATIVE, ALTERNATIVE | {"step_s": None}]}))
    assert lines[lines.index("what would fit:") :] == [
        "what would fit:",
        "  --set training.loss_chunk_tokens=256 --set data.max_length=448",
        "    3.25 GiB on the card, 8.0 s a step; texts are cut at 448 tokens",
        "  --set training.loss_chunk_tokens=256 --set data.max_length=448",
        "    3.25 GiB on the card; texts are cut at 448 tokens",
    ]


def test_without_a_card_a_plan_says_how_to_name_one() -> None:
    lines = list(plan_lines(WITHOUT_DATA | {"gpu": None, "budget_bytes": None, "fits": None}))
    assert lines[-1] == "name a card to see whether it fits: --gpu 'RTX 4060', or --vram-gib 8"
    assert not any("│" in line for line in lines)


@pytest.mark.parametrize(
    ("saves_bytes", "costs_s", "said"),
    [
        (1 << 30, 0.5, "saves 1.00 GiB, costs 0.5 s a step"),
        (1 << 20, 0, "saves 1.00 MiB, costs no time"),
        (1 << 20, None, "saves 1.00 MiB"),  # times are not known
        (2 << 30, -1.5, "saves 2.00 GiB, saves 1.5 s a step"),
        (-(1 << 30), -2, "takes 1.00 GiB, saves 2.0 s a step"),
    ],
)
def test_a_lever_says_what_it_saves_and_costs(saves_bytes: int, costs_s: float | None, said: str) -> None:
    lever = {"name": "n", "saves_bytes": saves_bytes, "costs_s": costs_s, "reason": "r"}
    assert f"  n: {said}; r" in list(plan_lines(PLAN | {"levers": [lever]}))


def test_a_measured_time_is_no_estimate() -> None:
    time = {"step_s": 2.0, "epoch_s": None, "tokens_per_s": 1000.0, "basis": "measured on this card"}
    assert "time: 2.0 s a step, 1,000 tokens/s (measured on this card)" in list(plan_lines(PLAN | {"time": time}))


@given(st.dictionaries(st.sampled_from(["weights", "logits and loss", "CUDA context", "x" * 25]), SIZES, min_size=1))
def test_segments_follow_one_another_and_end_at_the_whole(breakdown: dict[str, int]) -> None:
    device_bytes = max(1, sum(breakdown.values()))
    peak = PLAN["peak"] | {"device_bytes": device_bytes}
    without_card = {"budget_bytes": None, "gpu": None, "fits": None}
    lines = list(plan_lines(WITHOUT_DATA | without_card | {"breakdown": breakdown, "peak": peak}))
    assert max(map(len, lines)) <= 80
    bars = [line[39:] for line in lines[3 : 3 + len(breakdown)]]
    end = 0
    for bar in bars:
        segment = bar.strip()
        if segment:
            assert set(segment) == {"█"}
            assert len(bar) - len(segment) == end
            end = len(bar)
    assert end == lines[3 + len(breakdown)].count("█")


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=70), max_size=9))
def test_lines_have_at_most_80_columns(words: list[str]) -> None:
    lever = {"name": "n", "saves_bytes": 123456789, "costs_s": 0, "reason": " ".join(words)}
    data = PLAN["workload"]["data"] | {"notes": words, "samples": words[:1]}
    lines = list(plan_lines(PLAN | {"levers": [lever], "workload": PLAN["workload"] | {"data": data}}))
    assert max(map(len, lines)) <= 80
    assert not words or " ".join(words) in " ".join(" ".join(lines).split())


def test_methods_stand_side_by_side() -> None:
    full = PLAN | {"method": "full", "fits": False, "time": None}
    full |= {"breakdown": {"16-bit weights": 14 << 30}, "peak": PLAN["peak"] | {"device_bytes": 14 << 30}}
    lora = {"error": "the model can't be simulated\n  expected: a model\n  next: choose another"}
    lines = list(compare_lines({"full": full, "lora": lora, "qlora": WITHOUT_DATA | {"time": PLAN["time"]}}))
    assert lines[-14:] == [
        "                                   full         LoRA        QLoRA",
        "16-bit weights                14.00 GiB            –            –",
        "4-bit weights                         –            –     6.00 GiB",
        "CUDA context                          –            –   512.00 MiB",
        "on the card at most           14.00 GiB            –     6.50 GiB",
        "step, estimated                       –            –        9.5 s",
        "tokens/s                              –            –        2,362",
        "in 7.00 GiB                 doesn't fit            –         fits",
        "",
        "RTX 4060, 7.00 GiB of it for this run",
        "full: every weight but the vision tower's, which stays as it is",
        "LoRA can't be planned: the model can't be simulated",
        "  expected: a model",
        "  next: choose another",
    ]


def test_the_planner_is_given_settings_and_card(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "d.jsonl", "--val", "v.jsonl", "--image-root", "i", "--set", "data.max_length=77"]
    code, _, _ = run(capsys, "plan", "llava-1.5-7b", "--vram-gib", "9", "--reserve-gib", "1", *arguments)
    assert code == 0
    config = config_given(calls)
    assert config.preset == "ultra_low_memory"
    assert (config.data.data_path, config.data.val_path) == (Path("d.jsonl"), Path("v.jsonl"))
    assert (config.data.image_root, config.data.max_length) == (Path("i"), 77)
    assert calls.arguments["positional"][1] == CardWanted(gpu=None, vram_gib=9, reserve_gib=1)
    assert calls.arguments["uses_cache"] is True
    run(capsys, "plan", "llava-1.5-7b", "--no-cache")
    assert calls.arguments["uses_cache"] is False


@pytest.mark.parametrize("method", ["qlora", "lora", "full", "LoRA"])
def test_a_method_decides_weights_and_adapters(method: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "plan", "llava-1.5-7b", "--method", method)[0] == 0
    training = config_given(calls).training
    assert training.method is TrainingMethod(method.lower())
    assert training.quantization.load_in_4bit is (method == "qlora")
    assert (training.lora is None) is (method == "full")
    assert training.loss_chunk_tokens == 256  # the preset's values stay


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "lora", "--preset", "ultra_low_memory"], "preset = ultra_low_memory"),
        (["--method", "full", "--set", "training.lora.rank=4"], "contradicts training.lora"),
        (["--method", "loha"], "one of qlora, lora, full"),
        (["--compare", "--method", "lora"], "leave out --method"),
        (["--compare", "--write", "a.yaml"], "--write"),
        (["--write", "a.txt"], ".yaml, .yml, .json"),
    ],
)
def test_what_contradicts_itself_is_refused(
    arguments: list[str], said: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", "llava-1.5-7b", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert calls.arguments == {}


def test_a_model_must_be_given(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "--gpu", "4060")
    assert code == 2
    assert "give a MODEL" in err


def test_a_comparison_has_all_three_methods(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    compared = {"compare": {"full": PLAN, "lora": PLAN, "qlora": PLAN}}
    calls.answer("planning", "compare_as_json", lambda **_: compared)
    settings = ["--set", "training.lora.rank=4", "--preset", "low_memory"]
    code, out, _ = run(capsys, "plan", "llava-1.5-7b", "--compare", "--json", *settings)
    assert (code, json.loads(out)) == (0, compared)
    configs: dict[str, TrainingConfig] = calls.arguments["positional"][0]
    assert {name: config.training.method.value for name, config in configs.items()} == {
        name: name for name in ("full", "lora", "qlora")
    }
    assert configs["full"].training.lora is None
    assert {configs[name].training.lora.rank for name in ("lora", "qlora")} == {4}  # type: ignore[union-attr]
    assert {config.data.max_length for config in configs.values()} == {1024}


def test_json_is_the_plan_itself(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "plan", "m", "--json")[1]) == PLAN


def test_settings_are_written_for_training(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainingConfig.model_validate({"model": {"name": "llava-1.5-13b"}, "data": {"max_length": 99}})
    planned: dict[str, Any] = PLAN | {"config": config.model_dump(mode="json")}
    calls.answer("planning", "plan_as_json", lambda **_: planned)
    for name in ("planned.yaml", "planned.json"):
        assert run(capsys, "plan", "llava-1.5-13b", "--write", name)[0] == 0
        assert load_config(Path(name)).config == config
    code, _, err = run(capsys, "plan", "llava-1.5-13b", "--write", "planned.yaml")
    assert code == 2
    assert "a file that does not exist yet" in err


def test_settings_that_do_not_fit_are_not_written(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.answer("planning", "plan_as_json", lambda **_: PLAN | {"fits": False})
    code, out, err = run(capsys, "plan", "m", "--write", "planned.yaml")
    assert code == 4
    assert "does not fit" in out  # the plan is shown all the same
    assert "planned.yaml was not written: the run would take 6.50 GiB of the card's 7.00 GiB" in err
    assert list(Path().iterdir()) == []


def test_a_model_that_cannot_be_simulated_is_a_message(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(**_: Any) -> Any:
        raise UnsupportedModel("m asks for values", expected="shapes alone", next_step="train it to see")

    calls.answer("planning", "plan_as_json", fail)
    code, out, err = run(capsys, "plan", "m")
    assert (code, out) == (5, "")
    assert err == "error: m asks for values\n  expected: shapes alone\n  next: train it to see\n"
