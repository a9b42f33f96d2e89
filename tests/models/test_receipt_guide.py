"""The numbers in docs/guides/is-it-really-4bit.md are those of the model, and its code runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText

import tiny
from eightgig import registry
from eightgig.models.receipt import make_receipt
from tiny_training import load_tiny, tiny_config

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "is-it-really-4bit.md").read_text(encoding="utf-8")


def test_the_table_is_the_receipt_of_llava_7b() -> None:
    spec = registry.get("llava-1.5-7b")
    with init_empty_weights():
        config = spec.family.build_config(spec.facts)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    receipt = make_receipt(model, spec, tiny_config({"training": {"method": "lora"}}))
    written = re.findall(r"^\| ([a-z_ ]+) \| (?:4-bit|16-bit)[^|]*\| ([\d,]+) \| ([\d.]+) GiB \|$", GUIDE, re.MULTILINE)
    counted = [(row.group, f"{row.num_parameters:,}", f"{row.bytes_16bit / 2**30:.2f}") for row in receipt.rows]
    assert written == counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def test_the_check_by_hand_lists_the_4bit_layers(folder: Path) -> None:
    check, interpolation = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    model = load_tiny(folder, tiny_config()).model
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(check, {"model": model})
    lines = output.getvalue().splitlines()
    assert len(lines) == 14
    assert lines[0].endswith("q_proj torch.uint8 (2048, 1) nf4 True torch.Size([64, 64])")
    exec(interpolation, {"base": model})
    assert model.model.vision_tower(torch.randn(1, 3, 48, 48)).last_hidden_state.shape == (1, 37, 64)
