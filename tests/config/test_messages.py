"""Bad configurations, kind by kind: which problem is reported, at which path, with which value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from eightgig.config import load_config, resolve
from eightgig.core.errors import ConfigError, Problem

BAD_SETTINGS = {
    "unknown key, near one": (
        {"training": {"lora": {"rnk": 8}}},
        Problem("training.lora.rnk", "8", "unknown setting; did you mean training.lora.rank?"),
    ),
    "unknown key of another section": (
        {"training": {"image_size": 336}},
        Problem("training.image_size", "336", "unknown setting; did you mean data.image_size?"),
    ),
    "another trainer's name": (
        {"training": {"lr": 1e-4}},
        Problem("training.lr", "0.0001", "unknown setting; did you mean training.learning_rate?"),
    ),
    "unknown key, near nothing": (
        {"checkpoints": {"zzz": 1}},
        Problem("checkpoints.zzz", "1", "unknown setting; checkpoints has every_steps, keep_last, when_disk_is_full"),
    ),
    "unknown section": (
        {"validaton": {"every_steps": 5}},
        Problem("validaton", "{every_steps: 5}", "unknown setting; did you mean validation?"),
    ),
    "dotted key": (
        {"training.lora.rank": 8},
        Problem("training.lora.rank", "8", "dots are for --set only; in a file the groups are nested, one key a level"),
    ),
    "true for a number": (
        {"training": {"lora": {"rank": True}}},
        Problem("training.lora.rank", "true", "a whole number from 1 to 1024"),
    ),
    "a number for true": (
        {"hardware": {"gradient_checkpointing": 1}},
        Problem("hardware.gradient_checkpointing", "1", "true or false"),
    ),
    "text for a whole number": (
        {"training": {"batch_size": "8"}},
        Problem("training.batch_size", '"8"', "a whole number at least 1"),
    ),
    "a fraction for a whole number": (
        {"training": {"batch_size": 1.5}},
        Problem("training.batch_size", "1.5", "a whole number at least 1"),
    ),
    "zero": ({"training": {"num_epochs": 0}}, Problem("training.num_epochs", "0", "a whole number at least 1")),
    "rank too large": (
        {"training": {"lora": {"rank": 1025}}},
        Problem("training.lora.rank", "1025", "a whole number from 1 to 1024"),
    ),
    "learning rate of one": (
        {"training": {"learning_rate": 1}},
        Problem("training.learning_rate", "1", "a number above 0 and below 1"),
    ),
    "not a number": (
        {"training": {"learning_rate": float("nan")}},
        Problem("training.learning_rate", "nan", "a number above 0 and below 1"),
    ),
    "infinite": (
        {"training": {"max_grad_norm": float("inf")}},
        Problem("training.max_grad_norm", "inf", "a number above 0"),
    ),
    "a whole share": (
        {"data": {"val_fraction": 1.0}},
        Problem("data.val_fraction", "1.0", "a number at least 0 and below 1"),
    ),
    "a negative share": (
        {"data": {"max_bad_fraction": -0.1}},
        Problem("data.max_bad_fraction", "-0.1", "a number at least 0 and below 1"),
    ),
    "no such word": (
        {"hardware": {"mixed_precision": "bf8"}},
        Problem("hardware.mixed_precision", "bf8", "one of bf16, fp16, fp32"),
    ),
    "no such choice": (
        {"training": {"lr_schedule": "linear"}},
        Problem("training.lr_schedule", "linear", "one of cosine, constant"),
    ),
    "null where a value is needed": (
        {"seed": None},
        Problem("seed", "null", "a whole number at least 0 and below 9223372036854775808"),
    ),
    "a value for a section": (
        {"checkpoints": 5},
        Problem("checkpoints", "5", "a group of settings (every_steps, keep_last, when_disk_is_full)"),
    ),
    "a list for a path": ({"data": {"data_path": ["a"]}}, Problem("data.data_path", "['a']", "a path or null")),
    "a blank path": ({"data": {"data_path": " "}}, Problem("data.data_path", '" "', "a path; it is blank")),
    "a number for text": (
        {"model": {"revision": 7}},
        Problem("model.revision", "7", "text (in quotes where it looks like a number) or null"),
    ),
    "a broken regular expression": (
        {"training": {"lora": {"target_modules": "(q_proj"}}},
        Problem(
            "training.lora.target_modules",
            "(q_proj",
            "a regular expression (missing ), unterminated subpattern at position 0)",
        ),
    ),
    "no such preset": (
        {"preset": "ultra"},
        Problem(
            "preset",
            "ultra",
            "did you mean ultra_low_memory? one of ultra_low_memory, low_memory, balanced, high_quality, full",
        ),
    ),
    "a cap without a GPU": (
        {"hardware": {"device": "cpu", "cap_gib": 7.25}},
        Problem(
            "hardware.cap_gib",
            "7.25",
            "null with hardware.device = cpu: the cap is on what PyTorch reserves on a GPU",
        ),
    ),
    "checkpointed layers without checkpointing": (
        {"hardware": {"gradient_checkpointing": False, "checkpointed_layers": 4}},
        Problem(
            "hardware.checkpointed_layers",
            "4",
            "null with hardware.gradient_checkpointing = false: no layer is recomputed",
        ),
    ),
    "layer inputs on the host without checkpointing": (
        {"hardware": {"gradient_checkpointing": False, "offload_layer_inputs": True}},
        Problem(
            "hardware.offload_layer_inputs",
            "true",
            "false with hardware.gradient_checkpointing = false: no layer is recomputed",
        ),
    ),
    "projections in tiles of no size": (
        {"hardware": {"tiled_projections": True}},
        Problem(
            "hardware.tiled_projections",
            "true",
            "false with hardware.mlp_tile_tokens = null: it says how many tokens a tile has",
        ),
    ),
    "paging without a GPU": (
        {"hardware": {"device": "cpu"}, "training": {"optimizer": "paged_adamw_8bit"}},
        Problem(
            "training.optimizer",
            "paged_adamw_8bit",
            "auto, adamw or adamw_8bit with hardware.device = cpu: pages move between a GPU and the RAM",
        ),
    ),
    "too few streamed layers": (
        {"hardware": {"streamed_layers": 2}},
        Problem(
            "hardware.streamed_layers",
            "2",
            "0, or at least 3: the weights of two streamed layers are on the GPU at any time",
        ),
    ),
    "16-bit layers that are to be streamed": (
        {"hardware": {"streamed_layers": 4}, "training": {"method": "lora"}},
        Problem("hardware.streamed_layers", "4", "0 with training.method = lora: only 4-bit weights are streamed"),
    ),
    "a tower in 4 bits beside a language model in 16": (
        {"training": {"method": "lora", "quantization": {"vision_tower": True}}},
        Problem(
            "training.quantization.vision_tower",
            "true",
            "false with training.method = lora: 4-bit weights are for method qlora",
        ),
    ),
    "embeddings that are trained in RAM": (
        {"hardware": {"embedding_on_host": True}, "training": {"method": "full"}},
        Problem(
            "hardware.embedding_on_host",
            "true",
            "false with training.method = full: it trains the embeddings, which must then lie on the GPU",
        ),
    ),
}


def _write(folder: Path, settings: dict, suffix: str) -> Path:
    path = folder / f"run{suffix}"
    path.write_text(json.dumps(settings) if suffix == ".json" else yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_each_kind_of_bad_setting_is_one_problem(tmp_path: Path, kind: str, suffix: str) -> None:
    settings, expected = BAD_SETTINGS[kind]
    path = _write(tmp_path, settings, suffix)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.problems == (expected,)
    assert caught.value.source == f"file {path}"
    assert "eightgig config schema" in caught.value.next_step


def test_all_problems_of_a_file_come_at_once_contradictions_among_them(tmp_path: Path) -> None:
    settings = {
        "preset": "ultra_low_memory",
        "training": {
            "lora": {"rnk": 8, "alpha": 0},
            "batch_size": 0,
            "method": "full",
            "quantization": {"load_in_4bit": True},
        },
        "data": {"max_length": "many"},
        "hardware": {"device": "cpu", "cap_gib": 7, "gradient_checkpointing": False},
        "sed": 1,
    }
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, settings, ".yaml"))
    assert sorted(problem.path for problem in caught.value.problems) == [
        "data.max_length",
        "hardware.cap_gib",
        "hardware.gradient_checkpointing",
        "sed",
        "training.batch_size",
        "training.lora.alpha",
        "training.lora.rnk",
        "training.method",
        "training.method",
    ]
    assert "9 problems in the configuration" in str(caught.value)


def test_a_wrong_value_is_not_blamed_for_a_contradiction_as_well(tmp_path: Path) -> None:
    settings = {"hardware": {"device": "cup", "cap_gib": 7.25}, "training": {"method": "qlor", "lora": None}}
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, settings, ".yaml"))
    assert {problem.path for problem in caught.value.problems} == {"hardware.device", "training.method"}


def test_a_newer_schema_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, {"schema_version": 2, "galaxies": 3}, ".yaml"))
    assert caught.value.problems == (
        Problem("schema_version", "2", "1 at most; the settings were written by a newer EightGig"),
    )
    assert "pip install -U eightgig" in caught.value.next_step


@pytest.mark.parametrize("version", [0, -1, "1", True, None])
def test_a_schema_version_that_never_was_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(ConfigError, match=r"schema_version = .*: a whole number at least 1"):
        load_config(_write(tmp_path, {"schema_version": version}, ".json"))


def test_an_unknown_override_names_the_nearest_setting() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("balanced", {"trainin.batch_size": "4", "training.batch_sise": "4", "seed.x": "1"})
    assert {(problem.path, problem.allowed) for problem in caught.value.problems} == {
        ("trainin", "unknown setting; did you mean training?"),
        ("training.batch_sise", "unknown setting; did you mean training.batch_size?"),
        ("seed", "a whole number at least 0 and below 9223372036854775808"),
    }
    assert caught.value.source == "preset balanced with flag --set"
