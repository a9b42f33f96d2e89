"""Where each value came from, and which source wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightgig.config import FlagValue, describe, load_config, resolve
from eightgig.config.shape import all_paths


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("preset: low_memory\ntraining:\n  lora:\n    rank: 4\n  batch_size: 2\ndata: {}\n")
    return path


def test_flags_win_over_files_and_files_over_presets(file: Path) -> None:
    flags = [FlagValue("--image-root", "data.image_root", Path("pictures")), FlagValue("--seed", "seed", 5)]
    resolved = resolve(file, {"training.batch_size": "3", "seed": "6"}, flags=flags)
    expected = {
        "preset": ("low_memory", f"file {file}"),
        "training.lora.rank": (4, f"file {file}"),
        "training.lora.alpha": (32, "preset low_memory"),
        "training.batch_size": (3, "flag --set"),
        "data.image_root": (Path("pictures"), "flag --image-root"),
        "seed": (6, "flag --set"),
        "data.max_length": (1024, "preset low_memory"),
        "data.num_workers": (2, "default"),
        "training.quantization.load_in_4bit": (True, "preset low_memory"),
    }
    for path, (value, source) in expected.items():
        section = resolved.config
        for key in path.split("."):
            section = getattr(section, key)
        assert (section, resolved.sources[path]) == (value, source), path


def test_every_setting_has_a_source_and_a_row_in_the_schemas_order(file: Path) -> None:
    resolved = load_config(file)
    rows = describe(resolved)
    assert tuple(resolved.sources) == all_paths() == tuple(row.path for row in rows)
    assert all(row.reason for row in rows)
    by_path = {row.path: row for row in rows}
    assert by_path["training.lora.rank"].value == "4"
    assert by_path["training.lora.rank"].reason == "inner dimension of each adapter"
    assert by_path["training.lora.alpha"].reason == "twice the rank: updates are scaled by 2"
    assert by_path["data.val_path"].value == "null"


def test_what_follows_another_setting_says_which() -> None:
    resolved = resolve(None, {"training.method": "full"})
    assert resolved.sources["training.method"] == "flag --set"
    assert resolved.sources["training.quantization.load_in_4bit"] == "follows training.method"
    assert resolved.sources["training.lora"] == "follows training.method"
    assert not any(path.startswith("training.lora.") for path in resolved.sources)

    resolved = resolve("balanced", {"training.quantization.bnb_4bit_quant_type": "fp4"})
    assert resolved.sources["training.method"] == "preset balanced"

    resolved = resolve(None, {"training.quantization.load_in_4bit": "false"})
    assert resolved.sources["training.method"] == "follows training.quantization.load_in_4bit"
    assert resolved.sources["training.lora.rank"] == "default"

    resolved = resolve(None, {"training.lora": "null"})
    assert resolved.sources["training.lora"] == "flag --set"
    assert resolved.sources["training.method"] == "follows training.lora"


def test_a_flag_can_name_another_preset(file: Path) -> None:
    resolved = resolve(file, {"preset": "ultra_low_memory"})
    assert resolved.config.data.max_length == 512
    assert resolved.config.training.lora.rank == 4
    assert resolved.sources["preset"] == "flag --set"


def test_with_no_source_there_are_only_defaults() -> None:
    assert set(resolve(None).sources.values()) == {"default"}


@pytest.mark.parametrize("kind", [str, Path])
def test_a_presets_name_is_a_preset_as_text_or_as_path(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(kind("full")).config.preset == "full"
    Path("full").write_text("seed: 1")  # no configuration file: those end in .yaml, .yml or .json
    assert resolve(kind("full")).config.preset == "full"


def test_sources_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        resolve(None).sources["seed"] = "elsewhere"
