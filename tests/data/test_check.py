"""The pass before training: what it finds, counts, sets aside, and when it ends the run."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_image, write_jsonl, write_llava_jsonl
from transformers import LlavaProcessor

from eightgig.core.errors import DataError
from eightgig.data import check
from eightgig.data.check import check_samples
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import ProblemCode, Quarantine
from eightgig.data.sample import ImagePart
from eightgig.data.sources import load_samples
from eightgig.registry.llava import LlavaFamily


def flat(image: str, question: str = "What?", answer: str = "red") -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer}


def test_good_samples_are_counted(tmp_path: Path, encoder: Encoder, quarantine: Quarantine) -> None:
    path = write_llava_jsonl(tmp_path, num_samples=5, num_turns=2)
    write_image(tmp_path / "images" / "train-3.png", size=(90, 20))
    sample_set = load_samples(path, None, quarantine)
    progress: list[tuple[int, int]] = []
    report = check_samples(
        sample_set,
        encoder,
        quarantine,
        max_bad_fraction=0,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert report.samples == sample_set.samples
    assert (report.num_bad, report.num_images, report.largest_image_px) == (0, 5, (90, 20))
    encoded = [encoder.encode(sample) for sample in report.samples]
    assert report.max_text_tokens == max(len(sample.input_ids) - 4 for sample in encoded)
    assert report.num_supervised_tokens == sum(int((sample.labels >= 0).sum()) for sample in encoded)
    assert report.num_shortened_prompts == report.num_shortened_answers == report.num_escaped == 0
    assert progress == [(done, 5) for done in range(1, 6)]
    assert quarantine.path.read_text() == ""


def test_bad_samples_are_set_aside_and_the_rest_is_kept(
    tmp_path: Path, encoder: Encoder, quarantine: Quarantine
) -> None:
    for name in ("good.png", "cut.png"):
        write_image(tmp_path / name, size=(120, 90))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.png").write_text("<html>")
    records = [flat("good.png") for _ in range(6)]
    records[1:1] = [flat("gone.png"), flat("page.png"), flat("cut.png"), flat("good.png", answer=" ")]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    sample_set = load_samples(path, None, quarantine)
    report = check_samples(sample_set, encoder, quarantine, max_bad_fraction=0.4)
    assert [sample.source.line for sample in report.samples] == [1, 6, 7, 8, 9, 10]
    assert report.num_bad == 4
    written = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert sorted((record["line"], record["code"]) for record in written) == [
        (2, "missing_file"),
        (3, "not_an_image"),
        (4, "broken_image"),
        (5, "empty_answer"),
    ]
    assert {record["file"] for record in written} == {str(path)}


def test_too_many_bad_samples_end_the_run_with_the_commonest_reasons(
    tmp_path: Path, encoder: Encoder, quarantine: Quarantine
) -> None:
    write_image(tmp_path / "good.png")
    (tmp_path / "page.png").write_text("<html>")
    records = [flat("good.png")] * 6 + [flat("gone.png")] * 3 + [flat("page.png")] * 2
    records += [flat("good.png", answer="")] * 2 + [flat("../good.png")]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    sample_set = load_samples(path, None, quarantine)
    with pytest.raises(DataError) as caught:
        check_samples(sample_set, encoder, quarantine, max_bad_fraction=0.5)
    found = caught.value.found
    assert "8 of 14 samples (57.1 %) can't be used" in found
    assert f"- missing_file: 3 samples, e.g. {path}:7: {tmp_path}/gone.png does not exist" in found
    assert f"- empty_answer: 2 samples, e.g. {path}:12" in found
    assert f"- not_an_image: 2 samples, e.g. {path}:10" in found
    assert "path_outside_root" not in found  # only the three commonest
    assert caught.value.expected == "at most 50 % bad samples (data.max_bad_fraction = 0.5)"
    assert str(quarantine.path) in caught.value.next_step
    assert len(quarantine.path.read_text().splitlines()) == 8


@pytest.mark.parametrize(("max_bad_fraction", "fails"), [(0.25, False), (0.24, True)])
def test_the_share_may_be_reached_but_not_passed(
    tmp_path: Path, encoder: Encoder, quarantine: Quarantine, max_bad_fraction: float, *, fails: bool
) -> None:
    write_image(tmp_path / "good.png")
    path = write_jsonl(tmp_path / "train.jsonl", [flat("good.png")] * 3 + [flat("gone.png")])
    sample_set = load_samples(path, None, quarantine)
    if fails:
        with pytest.raises(DataError, match="1 of 4 samples"):
            check_samples(sample_set, encoder, quarantine, max_bad_fraction=max_bad_fraction)
    else:
        report = check_samples(sample_set, encoder, quarantine, max_bad_fraction=max_bad_fraction)
        assert (len(report.samples), report.num_bad) == (3, 1)


def test_no_good_sample_ends_the_run_whatever_is_allowed(
    tmp_path: Path, encoder: Encoder, quarantine: Quarantine
) -> None:
    sample_set = load_samples(write_jsonl(tmp_path / "train.jsonl", [flat("gone.png")]), None, quarantine)
    with pytest.raises(DataError, match="1 of 1 samples"):
        check_samples(sample_set, encoder, quarantine, max_bad_fraction=1.0)


def test_each_set_answers_for_its_own_bad_samples(tmp_path: Path, encoder: Encoder, quarantine: Quarantine) -> None:
    write_image(tmp_path / "good.png")
    records = [flat("good.png")] * 3
    bad = write_jsonl(tmp_path / "train.jsonl", [*records, flat("gone.png"), flat("x", answer="")])
    good = write_jsonl(tmp_path / "val.jsonl", records)
    first = check_samples(load_samples(bad, None, quarantine), encoder, quarantine, max_bad_fraction=0.5)
    second = check_samples(load_samples(good, None, quarantine), encoder, quarantine, max_bad_fraction=0)
    assert (first.num_bad, second.num_bad) == (2, 0)
    assert len(quarantine.path.read_text().splitlines()) == 2


def test_cuts_and_escapes_are_counted(tmp_path: Path, processor: LlavaProcessor, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png")
    records = [
        flat("a.png", "How many?", "2"),
        flat("a.png", "How many bars are there in the picture?", "seven"),
        flat("a.png", "Is <image> there?", "There are seven bars in the picture."),
    ]
    sample_set = load_samples(write_jsonl(tmp_path / "train.jsonl", records), None, quarantine)
    short = Encoder(processor, LlavaFamily(), max_length=16)
    report = check_samples(sample_set, short, quarantine, max_bad_fraction=0)
    encoded = [short.encode(sample) for sample in report.samples]
    assert report.num_shortened_prompts == sum(sample.num_cut_prompt_tokens > 0 for sample in encoded) == 2
    assert report.num_cut_prompt_tokens == sum(sample.num_cut_prompt_tokens for sample in encoded)
    assert report.num_shortened_answers == 1
    assert report.num_cut_answer_tokens == encoded[2].num_cut_answer_tokens > 0
    assert (report.num_escaped, report.max_text_tokens) == (1, 16)


def test_samples_without_room_for_an_answer_are_set_aside(
    tmp_path: Path, processor: LlavaProcessor, quarantine: Quarantine
) -> None:
    sample_set = load_samples(write_llava_jsonl(tmp_path, num_samples=2), None, quarantine)
    with pytest.raises(DataError, match=r"too_long: 2 samples.*within max_length = 5 text tokens"):
        check_samples(sample_set, Encoder(processor, LlavaFamily(), max_length=5), quarantine, max_bad_fraction=0.1)


def test_each_file_is_decoded_once(
    tmp_path: Path, encoder: Encoder, quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    path = write_jsonl(tmp_path / "train.jsonl", [flat(("a.png", "b.png")[i % 2]) for i in range(300)])
    decoded: list[ImagePart] = []
    check_image = check.check_image

    def counting(part: ImagePart) -> tuple[int, int]:
        decoded.append(part)
        return check_image(part)

    monkeypatch.setattr(check, "check_image", counting)
    report = check_samples(load_samples(path, None, quarantine), encoder, quarantine, max_bad_fraction=0)
    assert (len(report.samples), report.num_images) == (300, 300)
    assert sorted(str(part.path) for part in decoded) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_embedded_images_are_checked_too(tmp_path: Path, encoder: Encoder, quarantine: Quarantine) -> None:
    good = base64.b64encode(write_image(tmp_path / "a.png").read_bytes()).decode()
    bad = base64.b64encode(b"no image").decode()
    records = [flat(f"data:image/png;base64,{content}") for content in (good, bad, good, good)]
    sample_set = load_samples(write_jsonl(tmp_path / "train.jsonl", records), None, quarantine)
    report = check_samples(sample_set, encoder, quarantine, max_bad_fraction=0.3)
    assert [sample.source.line for sample in report.samples] == [1, 3, 4]
    assert [(record.line, record.code) for record in quarantine.records] == [(2, ProblemCode.NOT_AN_IMAGE)]
    assert "an embedded image of 8 bytes" in quarantine.records[0].reason


def test_each_good_sample_has_its_counts(tmp_path: Path, encoder: Encoder, quarantine: Quarantine) -> None:
    write_image(tmp_path / "a.png", size=(30, 20))
    write_image(tmp_path / "b.png", size=(20, 50))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    records = [flat("a.png", answer="red " * 7), flat("cut.png"), flat("b.png")]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    sample_set = load_samples(path, None, quarantine)
    checked = check.examine_samples(sample_set, encoder, quarantine, max_bad_fraction=0.5)
    assert [item.sample for item in checked] == [sample_set.samples[0], sample_set.samples[2]]
    assert [item.image_sizes_px for item in checked] == [((30, 20),), ((20, 50),)]
    for item in checked:
        assert item.text.num_text_tokens == len(encoder.encode(item.sample).input_ids) - 4
    by_header = check.examine_samples(sample_set, encoder, quarantine, max_bad_fraction=0.5, decodes_images=False)
    assert [item.image_sizes_px for item in by_header] == [((30, 20),), ((30, 20),), ((20, 50),)]
