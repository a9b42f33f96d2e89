"""Names, aliases, folders and hub ids: what each leads to, and what is said where it leads nowhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from eightgig import registry
from eightgig.core.errors import UnsupportedModel


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("llava-1.5-7b", "llava-1.5-7b"),
        (" LLaVA-1.5-7B ", "llava-1.5-7b"),
        ("llava-7b", "llava-1.5-7b"),
        ("llava-hf/llava-1.5-13b-hf", "llava-1.5-13b"),
    ],
)
def test_a_model_is_found_by_name_alias_and_hub_id(typed: str, name: str) -> None:
    assert registry.get(typed).name == name
    assert registry.resolve(typed) == registry.get(name)


def test_every_listed_model_is_found_under_its_name_and_no_name_is_used_twice() -> None:
    specs = registry.all_specs()
    names = [name for spec in specs for name in (spec.name, *spec.facts.aliases)]
    assert len(names) == len(set(names))
    assert [registry.get(spec.name).name for spec in specs] == [spec.name for spec in specs]
    assert {"llava-1.5-7b", "llava-1.5-13b"} <= {spec.name for spec in specs}


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnsupportedModel, match=r"'llava-1\.5-7bb'[\s\S]*did you mean llava-1\.5-7b"):
        registry.get("llava-1.5-7bb")
    with pytest.raises(UnsupportedModel, match=r"no folder of that name[\s\S]*did you mean llava-1\.5-13b"):
        registry.resolve("llava-1.5-13")


def test_a_name_that_resembles_nothing_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"known names: eightgig-demo, .*llava-1\.5-13b"):
        registry.get("xyz")


def test_a_folder_is_read_from_its_config(tmp_path: Path) -> None:
    spec = registry.resolve(str(tiny.build_tiny_llava(tmp_path / "my-model", image_px=48, patch_px=8)))
    assert (spec.name, spec.location, spec.family.name) == ("my-model", str(tmp_path / "my-model"), "llava")
    assert (spec.facts.image_px, spec.facts.num_language_linears, spec.facts.hub_id) == (48, 14, None)


def test_a_folder_of_another_architecture_is_refused_by_its_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModel, match=r"model_type 'bert'[\s\S]*one of: .*\bllava, "):
        registry.resolve(str(tmp_path))


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"has no config\.json \(it holds model\.safetensors\)"):
        registry.resolve(str(tmp_path))


def test_an_adapter_folder_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}))
    with pytest.raises(UnsupportedModel, match=r"an adapter, not a model[\s\S]*llava-hf/llava-1\.5-7b-hf"):
        registry.resolve(str(tmp_path))


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UnsupportedModel, match=r"config\.json is not JSON"):
        registry.resolve(str(tmp_path))


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(UnsupportedModel, match=r"there is no folder \./models/mine"):
        registry.resolve("./models/mine")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="is a file"):
        registry.resolve(str(tmp_path / "model.safetensors"))


def test_the_packaged_model_is_listed_with_the_licence_of_this_package() -> None:
    (packaged,) = (spec for spec in registry.all_specs() if spec.facts.hub_id is None)
    assert packaged == registry.get("eightgig-demo")
    assert packaged.facts.licence == "Apache-2.0"
    assert (Path(packaged.location) / "model.safetensors").is_file()


def test_looking_up_a_registry_name_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from eightgig import registry; registry.get('llava-7b'); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
