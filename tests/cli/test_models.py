"""`eightgig models`: the list, the search, and the facts of one model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_events import run

import tiny
from eightgig import registry

NAMES = {spec.name for spec in registry.all_specs()}


def test_the_list_has_every_model_once_with_parameters_tokens_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "models")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()[1:] if line and not line.startswith("image tokens:")}
    assert rows.keys() == NAMES
    # 1024 × 768 becomes 1036 × 756 on a grid of 28 px: 37 × 27 tokens
    assert rows["qwen2.5-vl-7b"].split() == ["qwen2.5-vl-7b", "8.29", "B", "999", "Apache-2.0"]
    assert rows["llava-1.5-7b"].split()[1:4] == ["7.06", "B", "576"]
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("Qwen3-VL", {"qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"}),
        ("qwen2-vl apache", {"qwen2-vl-2b", "qwen2-vl-7b"}),
        ("llava-hf/llava-1.5", {"llava-1.5-7b", "llava-1.5-13b"}),
        ("no such model", set()),
    ],
)
def test_search_wants_every_word_somewhere(words: str, found: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "--search", words, "--json")
    assert code == 0
    assert {facts["name"] for facts in json.loads(out)} == found


def test_a_search_without_result_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no model has 'xyz'" in run(capsys, "models", "--search", "xyz")[1]


def test_show_tells_what_is_quantised_and_trained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "show", "Qwen/Qwen3.5-4B")
    assert code == 0
    for said in ("4,539,265,536", "Apache-2.0 https://", "200 layers", "in_proj_[ab]", "in fp32", "<|im_end|>"):
        assert said in out
    facts = json.loads(run(capsys, "models", "show", "qwen3.5-4b", "--json")[1])
    assert facts["num_lora_layers"] == 24 * 6 + 8 * 7
    assert facts["image_tokens"] == {"1024 × 768": 32 * 24}
    assert facts["modules"]["projectors"] == ["model.visual.merger"]


def test_show_reads_a_folder_and_says_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.build_tiny_llava(tmp_path / "mine")
    code, out, _ = run(capsys, "models", "show", str(folder))
    assert code == 0
    assert "mine, family llava" in out
    assert "counted once it is loaded" in out
    assert json.loads(run(capsys, "models", "show", str(folder), "--json")[1])["num_parameters"] is None


def test_an_unknown_model_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "models", "show", "qwen3-vl-4")
    assert (code, out) == (5, "")
    assert "did you mean qwen3-vl-4b" in err


def test_a_card_leaves_out_what_cannot_fit_and_says_what_the_rest_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "--search", "llava-1.5", "--vram-gib", "8")
    assert code == 0
    heading, line, *rest = out.splitlines()
    assert heading.split()[-3:] == ["at", "least", "licence"]
    assert line.startswith("llava-1.5-7b ")
    assert re.search(r"\d\.\d\d GiB  Llama", line)
    assert "llava-1.5-13b" not in out
    assert rest[-1].startswith("at least: ")


def test_json_gives_the_least_bytes_of_a_card_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "models", "--search", "llava-1.5", "--vram-gib", "16", "--json")[1])
    assert [model["name"] for model in found] == ["llava-1.5-7b", "llava-1.5-13b"]
    small, large = (model["least_device_bytes"] for model in found)
    # 13.0 B language weights beside 6.6 B, at 0.516 bytes each (NF4 with double quantisation).
    assert large - small == pytest.approx(6.2e9 * 0.516, rel=0.1)
    assert json.loads(run(capsys, "models", "--search", "llava-1.5-7b", "--json")[1])[0]["least_device_bytes"] is None


def test_a_card_that_is_too_small_for_all_gets_an_empty_list_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "--search", "llava-1.5", "--vram-gib", "2")
    assert code == 0
    assert out.startswith("no model has 'llava-1.5' in its name, hub id, family or licence and leaves room on 2 GiB")
    assert run(capsys, "models", "--vram-gib", "0")[0] == 2
