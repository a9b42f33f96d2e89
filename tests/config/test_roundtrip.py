"""Whatever is valid survives a file, keeps its identity, and can't be changed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from eightgig.config import (
    ConfigPresets,
    DataConfig,
    LoRAConfig,
    TrainingConfig,
    json_schema,
    load_config,
    save_config,
)

# What a file can hold: no lone surrogates, no path ends (NUL).
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
tricky_texts = st.sampled_from(
    ["no", "1e-4", "0x1F", "null", "~", "010", "1:30", "- a", "a: b", "#", "'", '"', "é", "=", "<<"]
)
names = texts | tricky_texts
paths = names.filter(lambda text: text.strip() != "").map(Path)
counts = st.integers(1, 10**9)
fractions = st.floats(0, 1, exclude_max=True)


def sections(**fields: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


training = st.one_of(
    st.just({}),
    st.just({"method": "full"}),
    st.just({"lora": None, "quantization": {"load_in_4bit": False}}),
    st.just({"method": "lora"}),
).flatmap(
    lambda base: sections(
        batch_size=counts,
        gradient_accumulation_steps=counts,
        max_steps=st.none() | counts,
        learning_rate=st.floats(1e-30, 1, exclude_max=True),
        weight_decay=fractions,
        lr_schedule=st.sampled_from(["cosine", "constant"]),
        max_grad_norm=st.floats(1e-300, 1e300),
        optimizer=st.sampled_from(["auto", "adamw", "ADAMW_8BIT"]),
    ).map(lambda drawn: {**base, **drawn})
)
configs = st.builds(
    TrainingConfig,
    model=sections(name=names, revision=st.none() | names, random_weights_seed=st.none() | st.integers(0, 2**63 - 1)),
    training=training,
    data=sections(
        data_path=st.none() | paths,
        image_root=st.none() | paths,
        max_length=counts,
        image_size=st.none() | st.integers(14, 8192),
        val_fraction=fractions,
        num_workers=st.integers(0, 10**9),
        worker_start_method=st.sampled_from(["auto", "fork", "spawn", "forkserver"]),
    ),
    hardware=sections(
        device=st.sampled_from(["auto", "cuda"]),
        mixed_precision=st.sampled_from(["bf16", "fp16", "fp32"]),
        gradient_checkpointing=st.booleans(),
        mlp_tile_tokens=st.none() | counts | st.just("auto"),
        cache_image_features=st.booleans() | st.just("auto"),
        cap_gib=st.none() | st.floats(1e-3, 1e3),
    ),
    output_dir=paths,
    seed=st.integers(0, 2**63 - 1),
)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@given(config=configs)
def test_a_file_gives_the_equal_config_back(suffix: str, config: TrainingConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"run{suffix}"
        save_config(config, path)
        loaded = load_config(path)
    assert loaded.config == config
    assert hash(loaded.config) == hash(config)
    assert set(loaded.sources.values()) == {f"file {path}"}


@given(config=configs)
def test_plain_yaml_readers_read_the_same_values(config: TrainingConfig) -> None:
    """PyYAML's own SafeLoader, of YAML 1.1, is the independent reader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        save_config(config, path)
        text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text) == json.loads(config.model_dump_json())


@pytest.mark.parametrize("separator", ["\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("name", ["0{}", "{}0", "a{}b", "a{0}{0}b", "no{} "])
def test_yaml_keeps_what_its_readers_take_for_ends_of_lines(tmp_path: Path, name: str, separator: str) -> None:
    config = TrainingConfig(data={"data_path": name.format(separator)})
    save_config(config, tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text(encoding="utf-8")
    assert load_config(tmp_path / "run.yaml").config == config
    assert yaml.safe_load(text)["data"]["data_path"] == name.format(separator)


@pytest.mark.parametrize("name", ConfigPresets.names())
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_presets_survive_a_file(tmp_path: Path, name: str, suffix: str) -> None:
    config = getattr(ConfigPresets, name)(data_path="train.jsonl")
    save_config(config, tmp_path / f"run{suffix}")
    assert load_config(tmp_path / f"run{suffix}").config == config


def test_configs_are_equal_by_value_and_frozen() -> None:
    assert TrainingConfig() == TrainingConfig(seed=42)
    assert TrainingConfig() != TrainingConfig(seed=43)
    config = TrainingConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.training.lora.rank = 1


def test_built_in_python_a_wrong_value_is_pydantics_error_and_names_the_nearest_key() -> None:
    with pytest.raises(ValidationError, match=r"did you mean rank\?"):
        LoRAConfig(rnk=8)
    with pytest.raises(ValidationError, match="greater than or equal to 14"):
        DataConfig(image_size=13)


def test_the_home_folder_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert DataConfig(data_path="~/train.jsonl").data_path == Path("/somewhere/train.jsonl")


def test_the_json_schema_describes_every_setting_and_accepts_no_other() -> None:
    schema = json_schema()
    objects = [schema, *(item for item in schema["$defs"].values() if item["type"] == "object")]
    assert len(objects) == 9
    for item in objects:
        assert item["additionalProperties"] is False
        assert all(setting["description"] for setting in item["properties"].values())
    rank = schema["$defs"]["LoRAConfig"]["properties"]["rank"]
    assert (rank["type"], rank["minimum"], rank["maximum"]) == ("integer", 1, 1024)
    rate = schema["$defs"]["TrainingHyperparameters"]["properties"]["learning_rate"]
    assert (rate["type"], rate["exclusiveMinimum"], rate["exclusiveMaximum"]) == ("number", 0, 1)
    json.dumps(schema)
