"""What a new user does wrong, typed at the real command: each has its message, its exit code and leaves no mess."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.app.command_line import NOTHING, QUARANTINED, CommandLine, check_message
from tests.tiny import write_jsonl


def records(data: Path) -> list[dict[str, Any]]:
    """The tiny data's records, with image paths that hold from anywhere."""
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    return [line | {"image": str(data.parent / line["image"])} for line in lines]


# Configuration: nothing is made before all of it is right.
CONFIG_FILES = {
    "unknown key": (
        "a.yaml",
        "training: {lerning_rate: 1e-4}\n",
        ["file a.yaml", "1 problem", "training.lerning_rate = 0.0001", "did you mean training.learning_rate?"],
    ),
    "three problems at once": (
        "a.yaml",
        "training: {lora: {rank: 0}, num_epochs: many}\nfoo: 1\n",
        ["3 problems", "foo = 1: unknown setting"],
    ),
    "contradiction": (
        "a.yaml",
        "training: {method: qlora, quantization: {load_in_4bit: false}}\n",
        ["training.method = qlora", "contradicts training.quantization.load_in_4bit = false"],
    ),
    "preset without checkpointing": (
        "a.yaml",
        "preset: ultra_low_memory\nhardware: {gradient_checkpointing: false}\n",
        ["hardware.gradient_checkpointing = false", "true with preset = ultra_low_memory, made for 8 GB"],
    ),
    "broken YAML": (
        "a.yaml",
        "training: {rank: [1\n",
        ["file a.yaml", "line 2 = the end of the file", "no valid YAML", "correct the syntax of a.yaml"],
    ),
    "broken JSON": ("a.json", '{"seed": 1,\n', ["file a.json", "line 2", "no valid JSON", "correct the syntax"]),
    "newer layout": (
        "a.yaml",
        "schema_version: 9\nnew_thing: 1\n",
        ["schema_version = 9", "1 at most", "pip install -U eightgig"],
    ),
    "cap on the CPU": (
        "a.yaml",
        "hardware: {device: cpu, cap_gib: 4}\n",
        ["hardware.cap_gib = 4", "null with hardware.device = cpu"],
    ),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_wrong_file_of_settings(eightgig: CommandLine, case: str) -> None:
    name, text, said = CONFIG_FILES[case]
    (eightgig.folder / name).write_text(text)
    ended = eightgig("train", name, "--data", str(eightgig.data))
    check_message(ended, 2, *said)
    assert ended.new == NOTHING


def test_all_problems_of_a_file_are_listed_each_with_its_path(eightgig: CommandLine) -> None:
    (eightgig.folder / "a.yaml").write_text(CONFIG_FILES["three problems at once"][1])
    err = eightgig("train", "a.yaml").err
    for problem in (
        "training.lora.rank = 0: a whole number from 1 to 1024",
        "training.num_epochs = many: a whole number at least 1",
    ):
        assert f"\n  - {problem}\n" in err


COMMAND_LINES: dict[str, tuple[list[str], int, list[str]]] = {
    "missing file": (["train", "a.yaml"], 2, ["file = a.yaml: a file that exists", "name another file or a preset"]),
    "no such preset": (["train", "ultra_low"], 2, ["preset = ultra_low", "did you mean ultra_low_memory?"]),
    "no such preset as option": (["train", "--preset", "hi"], 2, ["preset = hi", "one of ultra_low_memory"]),
    "no such setting": (
        ["train", "--set", "training.lora.rnk=8"],
        2,
        ["training.lora.rnk = 8", "did you mean training.lora.rank?"],
    ),
    "blank data path": (["train", "--data", ""], 2, ['data.data_path = ""', "a path; it is blank"]),
    "blank output folder": (["train", "--output-dir", " "], 2, ["output_dir = ", "a path; it is blank"]),
    "cap without a GPU": (
        ["train", "--cap-gib", "4", "--data", "x"],
        2,
        ["hardware.cap_gib = 4", "only a GPU's memory can be capped", "leave hardware.cap_gib (--cap-gib) out"],
    ),
    "CUDA without a GPU": (
        ["train", "--set", "hardware.device=cuda"],
        6,
        ["hardware.device is cuda, but PyTorch sees no CUDA device", "nvidia-smi", "set hardware.device to cpu"],
    ),
    "resume of nothing": (["train", "--resume", "gone"], 7, ["there is no folder gone", "`eightgig train` made"]),
    "predict from nothing": (
        ["predict", "gone", "--question", "What?"],
        7,
        ["there is no folder gone", "or the folder of an adapter"],
    ),
    "report of nothing": (["report", "gone"], 7, ["there is no folder gone"]),
    "inspect of nothing": (["inspect", "gone"], 5, ["no model is called 'gone'"]),
    "predict without the picture": (
        ["predict", "--model", "eightgig-demo", "--image", "gone.png", "--question", "What?"],
        3,
        ["gone.png does not exist", "check the path after --image"],
    ),
    "predict with a blank question": (
        ["predict", "--model", "eightgig-demo", "--question", " "],
        3,
        ["the question is blank", "--question"],
    ),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_a_wrong_command(eightgig: CommandLine, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments, code, said = COMMAND_LINES[case]
    ended = eightgig(*arguments)
    check_message(ended, code, *said)
    assert ended.new == NOTHING


def test_a_number_of_processes_that_does_not_divide_the_accumulation(
    eightgig: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", property(lambda self: 3))
    ended = eightgig.train("--set", "training.gradient_accumulation_steps=4")
    check_message(ended, 2, "training.gradient_accumulation_steps = 4", "a multiple of the 3 processes", "change")
    assert ended.new - {"tiny.json"} == NOTHING


# Data: the run has a folder, which says how it ended.
def missing_data(command: CommandLine) -> list[str]:
    (command.folder / "train.jsonl").touch()
    return ["--data", "trian.jsonl"]


def empty_folder(command: CommandLine) -> list[str]:
    (command.folder / "photos").mkdir()
    return ["--data", "photos"]


def folder_without_captions(command: CommandLine) -> list[str]:
    shutil.copytree(command.data.parent / "images", command.folder / "photos")
    return ["--data", "photos"]


def unknown_shape(command: CommandLine) -> list[str]:
    write_jsonl(command.folder / "u.jsonl", [{"picture": "a.png", "label": "b"}])
    return ["--data", "u.jsonl"]


def empty_file(command: CommandLine) -> list[str]:
    (command.folder / "e.jsonl").touch()
    return ["--data", "e.jsonl"]


def not_utf8(command: CommandLine) -> list[str]:
    (command.folder / "l.jsonl").write_bytes('{"image": "a.png", "caption": "naïf"}\n'.encode("latin-1"))
    return ["--data", "l.jsonl"]


def broken_json_list(command: CommandLine) -> list[str]:
    (command.folder / "b.json").write_text('[{"image": "a.png", "caption": "x"},\n {"image": "b.p')
    return ["--data", "b.json"]


def too_many_bad(command: CommandLine) -> list[str]:
    good = records(command.data)
    bad = [good[0] | {"image": "gone.png"}, good[1] | {"conversations": []}, good[2] | {"image": str(command.data)}]
    write_jsonl(command.folder / "b.jsonl", bad + good[3:])
    return ["--data", "b.jsonl"]


def missing_image_root(command: CommandLine) -> list[str]:
    return ["--image-root", "gone"]


def missing_validation_data(command: CommandLine) -> list[str]:
    return ["--val", "val.jsonl"]


DATA = {
    missing_data: (
        NOTHING,
        ["trian.jsonl does not exist; there is train.jsonl", "a .json or .jsonl file", "check the path"],
    ),
    empty_folder: (NOTHING, ["photos holds neither data files nor images", ".txt files of the same name"]),
    folder_without_captions: (NOTHING, ["photos holds 14 images and no caption for any of them", "add the captions"]),
    unknown_shape: (NOTHING, ["u.jsonl has no known shape", "'picture', 'label'", "one of LLaVA", "rename the keys"]),
    empty_file: (NOTHING, ["e.jsonl holds no record that could be read", "one JSON object a line"]),
    not_utf8: (NOTHING, ["l.jsonl is not UTF-8: byte 0xef", "UTF-8", "iconv -f LATIN1 -t UTF-8 l.jsonl"]),
    broken_json_list: (NOTHING, ["b.json is not valid JSON: line 2", "correct line 2"]),
    missing_validation_data: (NOTHING, ["val.jsonl does not exist", "check the path"]),
    missing_image_root: (NOTHING, ["there is no folder gone", "data.image_root", "--image-root"]),
    too_many_bad: (
        QUARANTINED,
        ["3 of 14 samples (21.4 %) can't be used", "b.jsonl:", "at most 1 %", "run/quarantine.jsonl"],
    ),
}


@pytest.mark.parametrize("arrange", DATA, ids=lambda arrange: arrange.__name__)
def test_data_that_can_not_be_used(eightgig: CommandLine, arrange: Callable[[CommandLine], list[str]]) -> None:
    left, said = DATA[arrange]
    arguments = arrange(eightgig)
    before = eightgig.listing()
    ended = eightgig.train(*arguments)
    check_message(ended, 3, *said)
    assert eightgig.listing() - before - {"tiny.json"} == left
    if left:
        facts = json.loads((eightgig.folder / "run" / "run.json").read_text())
        assert facts["status"] == "failed"
        assert said[0] in facts["reason"]


def test_no_data_named(eightgig: CommandLine) -> None:
    ended = eightgig.train(settings={"model": {"name": str(eightgig.model)}})
    check_message(ended, 2, "data.data_path = null", "a .json or .jsonl file", "give it with --data PATH")


def test_one_bad_sample_among_many_is_set_aside_and_the_run_goes_on(eightgig: CommandLine) -> None:
    good = records(eightgig.data) * 8
    write_jsonl(eightgig.folder / "d.jsonl", [*good[:50], good[50] | {"image": "gone.png"}, *good[51:]])
    ended = eightgig.train("--data", "d.jsonl")
    assert ended.code == 0, ended.err
    assert "1 of 112 samples set aside, see run/quarantine.jsonl" in ended.err
    (record,) = map(json.loads, (eightgig.folder / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (record["file"], record["line"], record["code"]) == ("d.jsonl", 51, "missing_file")
    assert record["reason"].endswith("gone.png does not exist")


def test_a_corrected_mistake_needs_no_other_run_folder(eightgig: CommandLine) -> None:
    good = records(eightgig.data)
    write_jsonl(eightgig.folder / "d.jsonl", [*good[:7], good[7] | {"image": "gone.png"}])
    assert eightgig.train("--data", "d.jsonl").code == 3
    (eightgig.folder / "run" / "notes.txt").write_text("mine")
    ended = eightgig.train()
    assert ended.code == 0, ended.err
    facts = json.loads((eightgig.folder / "run" / "run.json").read_text())
    assert facts["status"] == "dry run"
    assert "reason" not in facts
    assert (eightgig.folder / "run" / "notes.txt").read_text() == "mine"


def test_a_question_that_is_too_long_is_not_cut_in_silence(eightgig: CommandLine) -> None:
    ended = eightgig("predict", "--model", str(eightgig.model), "--question", "Why? " * 600)
    check_message(ended, 3, "the question is", "tokens too long", "at most data.max_length = 512", "fewer words")
