"""Files and folders: what is read from them, what is set aside with which line, and what can't be used at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_image, write_jsonl

from eightgig.core.errors import DataError
from eightgig.data.quarantine import ProblemCode, Quarantine
from eightgig.data.sample import ImagePart
from eightgig.data.sources import load_samples

FLAT = {"image": "a.png", "question": "What?", "answer": "A cat."}
LLAVA = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}


def codes(quarantine: Quarantine) -> list[tuple[str, int, ProblemCode]]:
    return [(Path(record.file).name, record.line, record.code) for record in quarantine.records]


@pytest.mark.parametrize("record", [FLAT, LLAVA, CHAT], ids=["flat", "llava", "chat"])
@pytest.mark.parametrize("layout", ["list", "wrapped", "lines", "one object"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_content_decides_how_a_file_is_read(
    tmp_path: Path, quarantine: Quarantine, record: dict[str, Any], layout: str, suffix: str
) -> None:
    num = 1 if layout == "one object" else 3
    text = {
        "list": json.dumps([record] * 3, indent=1),
        "wrapped": json.dumps({"version": 1, "data": [record] * 3}, indent=1),
        "lines": "\n".join([json.dumps(record)] * 3),
        "one object": json.dumps(record),
    }[layout]
    path = tmp_path / f"train{suffix}"
    path.write_text(text)
    sample_set = load_samples(path, None, quarantine)
    assert len(sample_set.samples) == num
    assert [sample.source.line for sample in sample_set.samples] == list(range(1, num + 1))
    assert len(sample_set.bad) == 0 == len(quarantine)


def test_byte_order_mark_blank_lines_and_crlf(tmp_path: Path, quarantine: Quarantine) -> None:
    path = tmp_path / "train.jsonl"
    line = json.dumps(FLAT)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n  \r\n{line}\r\n".encode())
    samples = load_samples(path, None, quarantine).samples
    assert [sample.source.line for sample in samples] == [1, 4]
    assert [sample.sample_id for sample in samples] == ["train.jsonl:1", "train.jsonl:4"]


def test_line_separators_inside_a_text_do_not_split_a_record(tmp_path: Path, quarantine: Quarantine) -> None:
    answer = "one\u2028two\u2029three\x85four"
    path = write_jsonl(tmp_path / "train.jsonl", [{**FLAT, "answer": answer}])
    (sample,) = load_samples(path, None, quarantine).samples
    assert sample.messages[1].text == answer


def test_ids_are_kept_and_may_repeat(tmp_path: Path, quarantine: Quarantine) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"id": 7, **FLAT}, {"id": 7, **FLAT}, {"id": "x", **FLAT}])
    samples = load_samples(path, None, quarantine).samples
    assert [sample.sample_id for sample in samples] == ["7", "7", "x"]


def test_bad_records_are_set_aside_with_their_line(tmp_path: Path, quarantine: Quarantine) -> None:
    path = tmp_path / "train.jsonl"
    lines = [
        json.dumps(FLAT),
        '{"image": "a.png", "question": ',
        "[1, 2]",
        json.dumps(LLAVA),
        json.dumps({**FLAT, "id": "lost", "answer": ""}),
        json.dumps(FLAT),
    ]
    path.write_text("\n".join(lines))
    sample_set = load_samples(path, None, quarantine)
    assert len(sample_set.samples) == 2
    assert len(sample_set.bad) == 4
    assert codes(quarantine) == [
        ("train.jsonl", 2, ProblemCode.BAD_JSON),
        ("train.jsonl", 3, ProblemCode.WRONG_SHAPE),
        ("train.jsonl", 4, ProblemCode.WRONG_SHAPE),
        ("train.jsonl", 5, ProblemCode.EMPTY_ANSWER),
    ]
    assert "column 32" in quarantine.records[0].reason
    assert "must be a JSON object, not [1, 2]" in quarantine.records[1].reason
    assert "the file has the flat shape" in quarantine.records[2].reason
    assert "'image', 'conversations'" in quarantine.records[2].reason
    assert quarantine.records[3].sample_id == "lost"


def test_the_quarantine_file_holds_what_was_set_aside(tmp_path: Path, quarantine: Quarantine) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [FLAT, {**FLAT, "id": "bad", "answer": ""}])
    load_samples(path, None, quarantine)
    assert quarantine.write() == tmp_path / "quarantine.jsonl"
    (record,) = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert record == {
        "file": str(path),
        "line": 2,
        "sample_id": "bad",
        "reason": "an assistant's turn is empty",
        "code": "empty_answer",
    }


def test_a_folder_of_data_files_has_its_shape_told_per_file(tmp_path: Path, quarantine: Quarantine) -> None:
    write_jsonl(tmp_path / "b.jsonl", [LLAVA])
    write_jsonl(tmp_path / "a.jsonl", [FLAT, FLAT])
    (tmp_path / "c.json").write_text(json.dumps([CHAT]))
    sample_set = load_samples(tmp_path, None, quarantine)
    assert [(file.path.name, file.shape, file.num_records) for file in sample_set.manifest] == [
        ("a.jsonl", "flat", 2),
        ("b.jsonl", "LLaVA", 1),
        ("c.json", "chat messages", 1),
    ]
    assert [sample.source.file.name for sample in sample_set.samples] == ["a.jsonl", "a.jsonl", "b.jsonl", "c.json"]


def test_relative_images_lie_below_the_file_or_the_image_root(tmp_path: Path, quarantine: Quarantine) -> None:
    path = write_jsonl(tmp_path / "lists" / "train.jsonl", [{**FLAT, "image": "sub/a.png"}])
    (beside,) = load_samples(path, None, quarantine).samples
    assert beside.images == (ImagePart(path=tmp_path / "lists" / "sub" / "a.png"),)
    (tmp_path / "pictures").mkdir()
    (rooted,) = load_samples(path, tmp_path / "pictures", quarantine).samples
    assert rooted.images == (ImagePart(path=tmp_path / "pictures" / "sub" / "a.png"),)
    assert rooted.image_names == (str(tmp_path / "pictures" / "sub" / "a.png"),)


def test_captioned_images(tmp_path: Path, quarantine: Quarantine) -> None:
    for name in ("b.png", "a.jpg", "sub/c.PNG", "d.png"):
        write_image(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA cat.\r\n")
    (tmp_path / "b.txt").write_text("A dog.")
    (tmp_path / "sub" / "c.txt").write_text("A bird.")
    (tmp_path / "notes.txt").write_text("No image of this name.")
    sample_set = load_samples(tmp_path, None, quarantine)
    assert [(sample.sample_id, sample.messages[1].text) for sample in sample_set.samples] == [
        ("a.jpg", "A cat."),
        ("b.png", "A dog."),
        ("sub/c.PNG", "A bird."),
    ]
    assert sample_set.samples[2].images == (ImagePart(path=tmp_path / "sub" / "c.PNG"),)
    assert codes(quarantine) == [("d.png", 0, ProblemCode.MISSING_CAPTION)]
    assert quarantine.records[0].reason == "no d.txt beside the image"


@pytest.mark.parametrize("header", ["file_name,caption", "file_name,text"])
def test_metadata_csv_with_captions(tmp_path: Path, quarantine: Quarantine, header: str) -> None:
    rows = f'\ufeff{header}\r\na.png,"A cat, asleep\nand a ""dog""."\r\nsub/b.png,A bird.\r\nc.png\r\n'
    (tmp_path / "metadata.csv").write_bytes(rows.encode())
    (tmp_path / "other.jsonl").write_text("is not read, since the metadata file describes the folder")
    samples = load_samples(tmp_path, None, quarantine).samples
    assert [sample.messages[1].text for sample in samples] == ['A cat, asleep\nand a "dog".', "A bird."]
    assert [sample.messages[0].text for sample in samples] == ["Describe the image."] * 2
    assert samples[1].images == (ImagePart(path=tmp_path / "sub" / "b.png"),)
    assert codes(quarantine) == [("metadata.csv", 5, ProblemCode.EMPTY_ANSWER)]


def test_metadata_jsonl_with_questions(tmp_path: Path, quarantine: Quarantine) -> None:
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "question": "What?", "answer": "A cat."}])
    (sample,) = load_samples(tmp_path, None, quarantine).samples
    assert (sample.messages[0].text, sample.messages[1].text) == ("What?", "A cat.")
    assert sample.images == (ImagePart(path=tmp_path / "a.png"),)


def test_equal_files_have_equal_manifests_and_a_changed_one_does_not(tmp_path: Path, quarantine: Quarantine) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [FLAT])
    first = load_samples(path, None, quarantine).manifest
    assert load_samples(path, None, quarantine).manifest == first
    write_jsonl(path, [{**FLAT, "answer": "A dog."}])
    assert load_samples(path, None, quarantine).manifest != first


def broken_list(path: Path) -> Path:
    path.write_text('[{"image": "a.png"},\n {"image": ')
    return path


def utf16(path: Path) -> Path:
    path.write_text(json.dumps(FLAT), encoding="utf-16")
    return path


def latin1(path: Path) -> Path:
    path.write_bytes('{"question": "Größe?"}'.encode("latin-1"))
    return path


def unknown_shape(path: Path) -> Path:
    return write_jsonl(path, [{"prompt": "x", "completion": "y"}])


def empty(path: Path) -> Path:
    path.write_text("\n\n")
    return path


def no_captions(path: Path) -> Path:
    write_image(path.parent / "images" / "a.png")
    return path.parent / "images"


def csv_without_file_names(path: Path) -> Path:
    path.with_name("metadata.csv").write_text("picture,caption\na.png,A cat.\n")
    return path.parent


def bad_csv(path: Path) -> Path:
    path.with_name("metadata.csv").write_text('file_name,caption\na.png,"open quote\n')
    return path.parent


@pytest.mark.parametrize(
    ("make", "found", "expected", "next_step"),
    [
        (broken_list, "is not valid JSON: line 2, column 12", "a complete JSON list", "correct line 2"),
        (utf16, "(it begins like UTF-16)", "UTF-8", "iconv -f UTF-16"),
        (latin1, "is not UTF-8: byte 0xf6 at offset 16", "UTF-8", "iconv -f LATIN1"),
        (
            unknown_shape,
            "its first record has the keys 'prompt', 'completion'",
            'LLaVA: "image" and "conversations"',
            "rename the keys",
        ),
        (empty, "holds no record that could be read", '"messages"', "data-formats.md"),
        (no_captions, "holds 1 images and no caption for any of them", "metadata.csv", "add the captions"),
        (
            csv_without_file_names,
            "its first record has the keys 'picture', 'caption'",
            '"image" (or "file_name")',
            "rename the keys",
        ),
        (bad_csv, "line 2 is not CSV", "header line", "correct line 2"),
        (lambda path: path, "does not exist", ".json or .jsonl", "data.data_path"),
    ],
)
def test_what_cannot_be_used_at_all(
    tmp_path: Path, quarantine: Quarantine, make: Any, found: str, expected: str, next_step: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_samples(make(tmp_path / "train.json"), None, quarantine)
    assert found in caught.value.found
    assert expected in caught.value.expected
    assert next_step in caught.value.next_step


def test_a_mistyped_name_is_answered_with_the_nearest(tmp_path: Path, quarantine: Quarantine) -> None:
    write_jsonl(tmp_path / "train.jsonl", [FLAT])
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; there is .*train\.jsonl"):
        load_samples(tmp_path / "trian.jsonl", None, quarantine)
    with pytest.raises(DataError, match="and neither does its folder"):
        load_samples(tmp_path / "missing" / "train.jsonl", None, quarantine)
