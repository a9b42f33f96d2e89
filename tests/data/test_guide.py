"""Every example of docs/guides/data-formats.md, copied out of it and read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.tiny import write_image

from eightgig.data.check import check_samples
from eightgig.data.encode import Encoder
from eightgig.data.formats.flat import DEFAULT_QUESTION
from eightgig.data.quarantine import Quarantine
from eightgig.data.sources import load_samples

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "data-formats.md").read_text(encoding="utf-8")
BLOCKS = {name: text for name, text in re.findall(r"```\w+ title=\"([\w.]+)\"\n(.*?)```", GUIDE, re.DOTALL)}
SHAPES = {
    "llava.json": ("LLaVA", 1),
    "chat.jsonl": ("chat messages", 3),
    "flat.jsonl": ("flat", 2),
    "metadata.csv": ("flat", 1),
    "metadata.jsonl": ("flat", 1),
}


def test_the_guide_shows_every_shape() -> None:
    assert set(BLOCKS) == set(SHAPES)
    assert GUIDE.count("```") == 2 * len(SHAPES)
    assert f'"{DEFAULT_QUESTION}"' in GUIDE


@pytest.mark.parametrize("name", SHAPES)
def test_examples_can_be_trained_on(tmp_path: Path, encoder: Encoder, quarantine: Quarantine, name: str) -> None:
    write_image(tmp_path / "images" / "cat.png")
    (tmp_path / name).write_text(BLOCKS[name], encoding="utf-8")
    path = tmp_path if name.startswith("metadata") else tmp_path / name
    sample_set = load_samples(path, None, quarantine)
    report = check_samples(sample_set, encoder, quarantine, max_bad_fraction=0)
    assert (sample_set.manifest[0].shape, len(report.samples)) == SHAPES[name]
    assert report.num_images == len(report.samples)
    assert {sample.messages[-1].text for sample in report.samples} <= {"A grey cat.", "A grey cat on a sofa."}
