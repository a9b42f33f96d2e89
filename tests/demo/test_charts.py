"""The demo's task: charts whose pixels show the values, splits that share nothing, files any user could write."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tests.demo.pixels import mask_of

from eightgig.demo.charts import MAX_VALUE, MIN_VALUE, UNIT_PX, Chart, TaskFiles, deal_charts, draw_chart, write_task


def values_of(chart: Chart) -> tuple[int, ...]:
    return tuple(bar.value for bar in chart.bars)


def test_bars_are_as_high_as_their_values() -> None:
    num_bars = 0
    for chart in deal_charts("train", 150, seed=3):
        image = draw_chart(chart)
        for bar in chart.bars:
            if bar.colour == "black":  # the axis is nearly black too
                continue
            rows = mask_of(image, bar.colour).any(axis=1).sum()
            assert rows == bar.value * UNIT_PX, (bar, rows)
            num_bars += 1
    assert num_bars > 500


def test_bars_stand_left_to_right_and_never_overlap() -> None:
    for chart in deal_charts("test", 60, seed=5):
        image = draw_chart(chart)
        columns = [mask_of(image, bar.colour).any(axis=0).nonzero()[0] for bar in chart.bars if bar.colour != "black"]
        for one, other in itertools.pairwise(columns):
            assert one[-1] < other[0]


def test_splits_share_no_values_whatever_the_seeds() -> None:
    train = {values_of(chart) for chart in deal_charts("train", 3000, seed=0)}
    test = {values_of(chart) for chart in deal_charts("test", 600, seed=1)}
    assert not train & test


def test_each_answer_is_asked_equally_often() -> None:
    counts = Counter(chart.bars[chart.asked].value for chart in deal_charts("test", 200, seed=9))
    assert counts == dict.fromkeys(range(MIN_VALUE, MAX_VALUE + 1), 10)
    of_all_bars = Counter(value for chart in deal_charts("train", 2000, seed=9) for value in values_of(chart))
    share = 1 / (MAX_VALUE - MIN_VALUE + 1)
    assert all(abs(count / of_all_bars.total() - share) < 0.01 for count in of_all_bars.values())


def test_the_place_of_the_asked_bar_tells_nothing() -> None:
    places = Counter(chart.asked / len(chart.bars) < 0.5 for chart in deal_charts("train", 2000, seed=2))
    assert 0.4 < places[True] / 2000 < 0.65


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return write_task(tmp_path_factory.mktemp("task"), seed=4, num_train_images=30, num_test_images=200)


def test_files_are_in_the_llava_shape(files: TaskFiles) -> None:
    sizes = {files.train_jsonl: 30, files.test_jsonl: 200}
    for path, num_records in sizes.items():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len({record["id"] for record in records}) == num_records
        for record in records:
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
            assert len(turns) == 2 if path != files.train_jsonl else 8 <= len(turns) <= 12
            assert all(turn["value"] in {str(value) for value in range(1, 21)} for turn in turns[1::2])
            with Image.open(path.parent / record["image"]) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))


def test_written_answers_are_what_the_written_picture_shows(files: TaskFiles) -> None:
    for line in files.train_jsonl.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        image = Image.open(files.train_jsonl.parent / record["image"])
        turns = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            colour = question.removesuffix(" bar?").split()[-1]
            if colour != "black":
                assert mask_of(image, colour).any(axis=1).sum() == int(answer) * UNIT_PX


def test_a_seed_writes_the_same_files_and_another_does_not(files: TaskFiles, tmp_path: Path) -> None:
    again = write_task(tmp_path / "a", seed=4, num_train_images=30, num_test_images=200)
    other = write_task(tmp_path / "b", seed=5, num_train_images=30, num_test_images=200)
    assert again.train_jsonl.read_bytes() == files.train_jsonl.read_bytes()
    assert other.train_jsonl.read_bytes() != files.train_jsonl.read_bytes()
    names = sorted(path.name for path in (files.train_jsonl.parent / "images").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "a" / "images").iterdir())
    for name in names[::20]:
        one, two = files.train_jsonl.parent / "images" / name, tmp_path / "a" / "images" / name
        assert one.read_bytes() == two.read_bytes()
