"""What no data file and no picture may do: end a run with a traceback, stop it without end, or fill the memory.

`benchmarks/fuzz_data.py` sends thousands of the same inputs the same way; its record is in benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.fuzz_inputs import SHAPES, fuzzed_image, fuzzed_line, good_record, png_of_size
from PIL import Image
from tests.tiny import write_image, write_jsonl

from eightgig.core.errors import DataError
from eightgig.data import images
from eightgig.data.check import check_samples
from eightgig.data.encode import Encoder
from eightgig.data.images import check_image, image_size, load_image
from eightgig.data.quarantine import ProblemCode, Quarantine, SampleProblem
from eightgig.data.records import MAX_DEPTH, MAX_LINE_BYTES
from eightgig.data.sample import ImagePart
from eightgig.data.sources import load_samples

MIB = 1 << 20


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning")
def test_fuzzed_images_are_accepted_or_set_aside(tmp_path: Path, quarantine: Quarantine, encoder: Encoder) -> None:
    num = 300
    for seed in range(num):
        (tmp_path / f"{seed}.png").write_bytes(fuzzed_image(seed)[1])
    path = write_jsonl(tmp_path / "train.jsonl", [{"image": f"{seed}.png", "caption": "x"} for seed in range(num)])
    read = load_samples(path, None, quarantine)
    report = check_samples(read, encoder, quarantine, max_bad_fraction=1.0)
    assert len(report.samples) + len(quarantine) == num
    assert len(report.samples) > num / 5  # the damages leave some whole
    assert len(quarantine) > num / 5
    for sample in report.samples:  # what passed the check can be trained on
        assert encoder.encode(sample).num_images == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_fuzzed_lines_are_accepted_or_set_aside(
    tmp_path: Path, quarantine: Quarantine, encoder: Encoder, shape: str
) -> None:
    write_image(tmp_path / "a.png")
    first = json.dumps(good_record(shape, random.Random(0))).encode()
    lines = [first, *(fuzzed_line(seed, shape) for seed in range(300))]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
    read = load_samples(tmp_path / "train.jsonl", None, quarantine)
    report = check_samples(read, encoder, quarantine, max_bad_fraction=1.0)
    num_lines = sum(1 for line in b"\n".join(lines).split(b"\n") if line.strip())
    assert len(report.samples) + len(quarantine) == num_lines
    assert len(report.samples) > 30
    assert len(quarantine) > 100
    for sample in report.samples:
        assert (encoder.encode(sample).labels >= 0).any()
    written = quarantine.path.read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["reason"] for line in written] == [record.reason for record in quarantine.records]
    assert max(map(len, written)) < 15_000  # a reason quotes the beginning of what is wrong, not all of it


GOOD = {"image": "a.png", "question": "What?", "answer": "A cat."}
ODD_LINES: dict[str, tuple[bytes, ProblemCode, str]] = {
    "not UTF-8": (
        b'{"image": "a.png", "caption": "na\xefve"}',
        ProblemCode.BAD_ENCODING,
        "byte 0xef at offset 33 of line 2",
    ),
    "nested without end": (b'{"caption": ' + b"[" * 100_000, ProblemCode.BAD_JSON, f"more than {MAX_DEPTH} lists"),
    "nested deeply": (
        json.dumps({**GOOD, "more": json.loads("[" * 100 + "]" * 100)}).encode(),
        ProblemCode.BAD_JSON,
        f"more than {MAX_DEPTH} lists",
    ),
    "a list nested deeply": (b"[" * 500 + b"]" * 500, ProblemCode.WRONG_SHAPE, "must be a JSON object"),
    "thousands of digits": (
        b'{"image": "a.png", "caption": ' + b"9" * 5000 + b"}",
        ProblemCode.BAD_JSON,
        "4300 digits",
    ),
    "half a surrogate pair": (rb'{"image": "a.png", "caption": "\ud83d"}', ProblemCode.BAD_JSON, "surrogate pair"),
    "half a pair as a key": (
        rb'{"image": "a.png", "caption": "x", "\udc00": 1}',
        ProblemCode.BAD_JSON,
        "surrogate pair",
    ),
    "a key twice": (b'{"image": "a.png", "caption": "x", "caption": "y"}', ProblemCode.BAD_JSON, "the same key twice"),
    "a key twice inside": (
        b'{"image": "a.png", "caption": "x", "m": [{"a": 1, "a": 1}]}',
        ProblemCode.BAD_JSON,
        "twice",
    ),
    "NaN for a text": (b'{"image": "a.png", "caption": NaN}', ProblemCode.BAD_FIELD, "must be text, not nan"),
    "infinity for a text": (b'{"image": "a.png", "caption": 1e999}', ProblemCode.BAD_FIELD, "must be text, not inf"),
    "NUL in the line": (b'{"image": "a.png", "caption": "a\0b"}', ProblemCode.BAD_JSON, "Invalid control character"),
    "NUL in a path": (rb'{"image": "a\u0000.png", "caption": "x"}', ProblemCode.BAD_FIELD, r"'a\x00.png'"),
    "an endless path": (
        json.dumps({**GOOD, "image": "a" * 5000}).encode(),
        ProblemCode.BAD_FIELD,
        "path can't be 'aaa",
    ),
    "an endless text": (json.dumps({**GOOD, "answer": "a " * 125_001}).encode(), ProblemCode.TOO_LARGE, "250,0"),
}


@pytest.mark.parametrize("case", ODD_LINES)
def test_an_odd_line_is_set_aside_with_its_reason(tmp_path: Path, quarantine: Quarantine, case: str) -> None:
    line, code, reason = ODD_LINES[case]
    good = json.dumps(GOOD).encode()
    (tmp_path / "train.jsonl").write_bytes(b"\n".join((good, line, good)))
    read = load_samples(tmp_path / "train.jsonl", None, quarantine)
    assert [sample.source.line for sample in read.samples] == [1, 3]
    (record,) = quarantine.records
    assert (record.line, record.code) == (2, code)
    assert reason in record.reason


@pytest.mark.parametrize("case", ["half a surrogate pair", "a key twice", "nested deeply"])
def test_an_odd_item_of_a_list_is_set_aside(tmp_path: Path, quarantine: Quarantine, case: str) -> None:
    line, code, _ = ODD_LINES[case]
    good = json.dumps(GOOD).encode()
    (tmp_path / "train.json").write_bytes(b"[" + b",\n".join((good, line, good)) + b"]")
    assert len(load_samples(tmp_path / "train.json", None, quarantine).samples) == 2
    assert [(record.line, record.code) for record in quarantine.records] == [(2, code)]


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[" + b"9" * 5000 + b"]", b'[{"a": "\xff"}]'])
def test_a_list_that_no_parser_takes_is_explained(tmp_path: Path, quarantine: Quarantine, text: bytes) -> None:
    (tmp_path / "train.json").write_bytes(text)
    with pytest.raises(DataError, match=r"train\.json"):
        load_samples(tmp_path / "train.json", None, quarantine)


def test_a_bad_list_in_the_first_line_spoils_no_other_line(tmp_path: Path, quarantine: Quarantine) -> None:
    (tmp_path / "train.jsonl").write_text("[1, 2]\n" + json.dumps(GOOD) + "\n" + json.dumps({"data": 1}) + "\n")
    assert [sample.source.line for sample in load_samples(tmp_path / "train.jsonl", None, quarantine).samples] == [2]
    assert [record.line for record in quarantine.records] == [1, 3]


@pytest.mark.parametrize("given", [None, [1], {"a": 1}, "x" * 10_000, True])
def test_an_id_is_a_name_whatever_was_given(tmp_path: Path, quarantine: Quarantine, given: Any) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{**GOOD, "id": given}])
    (sample,) = load_samples(path, None, quarantine).samples
    assert sample.sample_id in ("train.jsonl:1", "x" * 200, "True")


def test_a_caption_that_is_no_text_is_set_aside(tmp_path: Path, quarantine: Quarantine) -> None:
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(b"na\xefve")
    (tmp_path / "b.txt").write_text("x" * (MIB + 1))
    (tmp_path / "c.txt").write_text("A cat.")
    assert [sample.sample_id for sample in load_samples(tmp_path, None, quarantine).samples] == ["c.png"]
    assert [record.code for record in quarantine.records] == [ProblemCode.BAD_ENCODING, ProblemCode.TOO_LARGE]


# Memory: the most a fresh process held, with the inputs and without.
READ_AND_CHECK = """
import resource, sys
from pathlib import Path
from eightgig.data.check import check_image
from eightgig.data.quarantine import Quarantine, SampleProblem
from eightgig.data.sources import load_samples

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, before = Path(sys.argv[1]), peak()
quarantine = Quarantine(folder / "quarantine.jsonl")
codes = []
for sample in load_samples(folder / "train.jsonl", None, quarantine).samples:
    for part in sample.images:
        try:
            check_image(part)
        except SampleProblem as problem:
            codes.append(problem.code.value)
print(peak() - before, *(record.code.value for record in quarantine.records), *codes)
"""


def test_neither_an_endless_line_nor_a_bomb_fills_the_memory(tmp_path: Path) -> None:
    records = [{"image": f"{index}.png", "caption": "x"} for index in range(4)]
    path = write_jsonl(tmp_path / "train.jsonl", records)
    (tmp_path / "0.png").write_bytes(png_of_size(30_000, 30_000))
    (tmp_path / "1.png").write_bytes(png_of_size(12_000, 9_000))  # more than Pillow's limit, less than twice of it
    (tmp_path / "2.png").write_bytes(png_of_size(10, 10))
    os.truncate(tmp_path / "2.png", 2 << 30)  # a file with a hole, which takes no room on the disk
    write_image(tmp_path / "3.png")
    with path.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(1 << 30, os.SEEK_CUR)
        stream.write(b"\n" + json.dumps(records[3]).encode())
    command = [sys.executable, "-c", READ_AND_CHECK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    grown_bytes, *codes = ended.stdout.split()
    assert codes == ["too_large", "too_many_pixels", "too_many_pixels", "too_large"]
    assert int(grown_bytes) < 3 * MAX_LINE_BYTES


def test_large_images_are_checked_one_at_a_time(
    tmp_path: Path, quarantine: Quarantine, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    upright, lock = images._upright_rgb, threading.Lock()
    num_now, most = 0, 0

    def counting(image: Image.Image) -> Image.Image:
        nonlocal num_now, most
        with lock:
            num_now += 1
            most = max(most, num_now)
        time.sleep(0.02)
        with lock:
            num_now -= 1
        return upright(image)

    monkeypatch.setattr(images, "_upright_rgb", counting)
    for index in range(6):
        write_image(tmp_path / f"{index}.png", seed=index)
    path = write_jsonl(tmp_path / "train.jsonl", [{"image": f"{index}.png", "caption": "x"} for index in range(6)])
    read = load_samples(path, None, quarantine)
    check_samples(read, encoder, quarantine, max_bad_fraction=0, num_threads=4)
    assert most > 1
    most = 0
    monkeypatch.setattr(images, "LARGE_PX", 40 * 30 - 1)
    check_samples(read, encoder, quarantine, max_bad_fraction=0, num_threads=4)
    assert most == 1


# What is no picture.
def test_a_pipe_is_not_waited_for(tmp_path: Path, quarantine: Quarantine) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (check_image, load_image, image_size):
        with pytest.raises(SampleProblem, match="no file but a pipe or a device") as caught:
            read(ImagePart(path=tmp_path / "a.png"))
        assert caught.value.code is ProblemCode.NOT_AN_IMAGE
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_samples(tmp_path / "a.png", None, quarantine)


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_a_program_is_no_picture(tmp_path: Path, name: str) -> None:
    """Pillow would have Ghostscript run a PostScript file."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / name)
    with pytest.raises(SampleProblem, match="no image that Pillow can read as AVIF, BMP") as caught:
        check_image(ImagePart(path=tmp_path / name))
    assert caught.value.code is ProblemCode.NOT_AN_IMAGE


# Paths.
OUTSIDE = {
    "../a.png": ProblemCode.PATH_OUTSIDE_ROOT,
    "b/../../a.png": ProblemCode.PATH_OUTSIDE_ROOT,
    "ABSOLUTE": ProblemCode.PATH_OUTSIDE_ROOT,
    "file://ABSOLUTE": ProblemCode.PATH_OUTSIDE_ROOT,
    "//ABSOLUTE": ProblemCode.PATH_OUTSIDE_ROOT,
    "link.png": ProblemCode.PATH_OUTSIDE_ROOT,
    "linked/a.png": ProblemCode.PATH_OUTSIDE_ROOT,
    "https://host/a.png": ProblemCode.REMOTE_IMAGE,
    "FTP://host/a.png": ProblemCode.REMOTE_IMAGE,
    "s3://bucket/a.png": ProblemCode.REMOTE_IMAGE,
    "C:\\a.png": ProblemCode.BAD_FIELD,
    "c:/a.png": ProblemCode.BAD_FIELD,
    "\\\\host\\share\\a.png": ProblemCode.BAD_FIELD,
    "a.png\0.txt": ProblemCode.BAD_FIELD,
}


@pytest.mark.skipif(os.name == "nt", reason="there a drive's letter begins a path of this system")
@pytest.mark.parametrize("reference", OUTSIDE)
def test_no_path_leaves_the_image_root(tmp_path: Path, quarantine: Quarantine, reference: str) -> None:
    outside = write_image(tmp_path / "elsewhere" / "a.png")
    root = write_image(tmp_path / "root" / "a.png").parent
    (root / "link.png").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    written = reference.replace("ABSOLUTE", str(outside))
    path = write_jsonl(tmp_path / "train.jsonl", [{**GOOD, "image": written}, {**GOOD, "image": str(root / "a.png")}])
    (sample,) = load_samples(path, root, quarantine).samples
    assert sample.images == (ImagePart(path=root / "a.png"),)
    assert [record.code for record in quarantine.records] == [OUTSIDE[reference]]


def test_without_an_image_root_absolute_paths_and_links_are_the_users_own(
    tmp_path: Path, quarantine: Quarantine
) -> None:
    outside = write_image(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(outside)
    records = [{**GOOD, "image": "link.png"}, {**GOOD, "image": str(outside)}]
    path = write_jsonl(tmp_path / "set" / "train.jsonl", records)
    samples = load_samples(path, None, quarantine).samples
    assert [check_image(sample.images[0]) for sample in samples] == [(40, 30)] * 2
