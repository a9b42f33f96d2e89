"""Files that hold no settings at all, and the traps of YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightgig.config import TrainingConfig, load_config, resolve, save_config
from eightgig.config.textformat import parse, parse_scalar
from eightgig.core.errors import ConfigError, Problem

BROKEN = {
    "empty.yaml": ("", Problem("file", "empty", "settings, such as `preset: ultra_low_memory`")),
    "comments.yaml": ("# nothing\n", Problem("file", "empty", "settings, such as `preset: ultra_low_memory`")),
    "null.json": ("null", Problem("file", "empty", "settings, such as `preset: ultra_low_memory`")),
    "list.yaml": (
        "- a\n- b\n",
        Problem("file", "a list", "groups of settings, such as `data:` with `data_path: train.jsonl` inside"),
    ),
    "word.yaml": (
        "hello",
        Problem("file", "a single value", "groups of settings, such as `data:` with `data_path: train.jsonl` inside"),
    ),
    "number.json": (
        "5",
        Problem("file", "a single value", "groups of settings, such as `data:` with `data_path: train.jsonl` inside"),
    ),
    "twice.yaml": (
        "seed: 1\ndata: {}\nseed: 2\n",
        Problem("line 3", "seed: 2", "no valid YAML: the key 'seed' stands twice"),
    ),
    "twice_inside.yaml": (
        "training:\n  lora:\n    rank: 8\n    rank: 9\n",
        Problem("line 4", "rank: 9", "no valid YAML: the key 'rank' stands twice"),
    ),
    "twice.json": ('{"seed": 1, "seed": 2}', Problem("seed", "given more than once", "each key once in its section")),
    "indent.yaml": (
        "data:\n  max_length: 5\n image_size: 3\n",
        Problem("line 3", "image_size: 3", "no valid YAML: expected <block end>, but found '<block mapping start>'"),
    ),
    "tab.yaml": (
        "data:\n\tmax_length: 5\n",
        Problem("line 2", "max_length: 5", "no valid YAML: found character '\\t' that cannot start any token"),
    ),
    "open.yaml": (
        "data: [1, 2\n",
        Problem("line 2", "the end of the file", "no valid YAML: expected ',' or ']', but got '<stream end>'"),
    ),
    "tagged.yaml": (
        "seed: !!int x\n",
        Problem("line 1", "seed: !!int x", "no valid YAML: invalid literal for int() with base 10: 'x'"),
    ),
    "python.yaml": (
        "seed: !!python/object:os.system x\n",
        Problem(
            "line 1",
            "seed: !!python/object:os.system x",
            "no valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
    ),
    "listkey.yaml": ("? [a]\n: 1\n", Problem("line 1", "? [a]", "no valid YAML: a key must be plain text")),
    "comma.json": (
        '{\n  "seed": 1,\n}',
        None,  # the wording differs from Python to Python
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_holds_no_settings_says_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    text, expected = BROKEN[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert str(path) in str(caught.value)
    assert str(path) in caught.value.next_step
    if expected is not None:
        assert problem == expected
    else:
        assert problem.path in ("line 2", "line 3")
        assert problem.allowed.startswith("no valid JSON: ")


def test_a_missing_file_names_the_most_similar_one(tmp_path: Path) -> None:
    (tmp_path / "charts.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"chart\.yaml: a file that exists; did you mean .*charts\.yaml\?"):
        load_config(tmp_path / "chart.yaml")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        load_config(tmp_path / "nowhere" / "run.yaml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"a file that can be read \(Is a directory\)"):
        load_config(tmp_path / "run.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match=r"byte 6 is no UTF-8: text in UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_a_control_character_is_placed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"seed: 1\nmodel:\n  name: a\x00b\n")
    with pytest.raises(ConfigError, match=r"line 3 = .*: no valid YAML: special characters are not allowed"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", ["run.toml", "run", "run.yaml.bak"])
def test_another_suffix_is_refused_for_reading_and_writing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"a name that ends in \.yaml, \.yml, \.json"):
        load_config(tmp_path / name)
    with pytest.raises(ConfigError, match=r"a name that ends in \.yaml, \.yml, \.json"):
        save_config(TrainingConfig(), tmp_path / name)


def test_a_word_that_is_neither_preset_nor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("balance", Path("balance")):
        with pytest.raises(ConfigError, match=r"balance: neither a preset nor a file; did you mean balanced\?"):
            resolve(word)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "run.YAML"
    path.write_bytes(b"\xef\xbb\xbfseed: 7\r\ndata:\r\n  max_length: 64\r\n")
    config = load_config(path).config
    assert (config.seed, config.data.max_length) == (7, 64)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'", ".0001", "1.0e-4", "+1e-4"])
def test_every_way_to_write_a_small_number_works(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training:\n  learning_rate: {text}\n")
    assert load_config(path).config.training.learning_rate == 1e-4
    assert resolve(None, {"training.learning_rate": text}).config.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("010", 10.0),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("true", True),
        ("True", "True"),
        ("~", None),
        ("null", None),
        ("12", 12),
        ("-3", -3),
        ("1.", 1.0),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    for parsed in (parse(f"key: {text}\n", ".yaml")["key"], parse_scalar(text)):
        assert parsed == value
        assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("'8'", "8"),
        ('"null"', "null"),
        ("a: b", "a: b"),
        (r".*\.(q|k)_proj", r".*\.(q|k)_proj"),
        ("[ab]+", "[ab]+"),
        ("*x", "*x"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_text_behind_set_is_one_plain_value(text: str, value: object) -> None:
    assert parse_scalar(text) == value
