"""The receipt counts what is there: groups, parameters, and bytes down to the quantisation constants."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from eightgig.core.errors import UnsupportedModel
from eightgig.models.receipt import GROUPS, Receipt, make_receipt
from tiny_training import load_tiny, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


def test_groups_add_up_to_the_model(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config({"training": {"method": "lora"}}, precision="bf16"))
    receipt = loaded.receipt
    by_group = {row.group: row for row in receipt.rows}
    assert list(by_group) == [group for group in GROUPS if group in by_group]
    assert receipt.num_parameters == sum(value.numel() for value in loaded.model.parameters())
    assert receipt.bytes_now == receipt.bytes_16bit == 2 * receipt.num_parameters
    for group, path in (("vision tower", "model.vision_tower"), ("projector", "model.multi_modal_projector")):
        expected = sum(value.numel() for value in loaded.model.get_submodule(path).parameters())
        assert by_group[group].num_parameters == expected
    assert by_group["projector"].num_modules == 2
    assert by_group["norms"].module_class == "LlamaRMSNorm"
    assert by_group["language linears"].num_modules == 14


def test_4bit_bytes_are_those_of_a_saved_model(folder: Path) -> None:
    """Independent count: what bitsandbytes itself would write for the layer, less the packed description."""
    loaded = load_tiny(folder, tiny_config(precision="bf16"))
    row = next(row for row in loaded.receipt.rows if row.group == "language linears")
    expected = 0
    for module in loaded.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            for name, tensor in module.state_dict().items():
                if "bitsandbytes__" not in name:
                    expected += tensor.numel() * tensor.element_size()
            expected += 4  # the nested state's offset, an fp32 scalar, is written inside the description
    shared_tables = 14 * 16 * 4  # each layer's code table of 16 values is written once a layer
    assert abs(row.bytes_now - expected) <= shared_tables + 14 * 1024
    weights_only = row.num_parameters // 2
    assert weights_only < row.bytes_now <= expected
    assert row.is_4bit
    assert row.storage_dtype == "uint8"
    assert row.num_parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128)


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    tiny.build_tiny_llava(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    # transformers unties a head that the file holds separately
    stored = load_file(tmp_path / "model.safetensors")
    weights = {name: value for name, value in stored.items() if not name.endswith("lm_head.weight")}
    assert len(weights) == len(stored) - 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_tiny(tmp_path, tiny_config())
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    logical = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    others = {id(v): v.numel() for v in loaded.model.parameters() if not isinstance(v, bnb.nn.Params4bit)}
    assert loaded.receipt.num_parameters == logical + sum(others.values())
    assert "lm_head" not in {row.group for row in loaded.receipt.rows}


def test_adapters_appear_as_a_group_of_their_own(folder: Path) -> None:
    before = load_tiny(folder, tiny_config()).receipt
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    *others, adapters = loaded.receipt.rows
    assert tuple(others) == before.rows
    assert (adapters.group, adapters.storage_dtype, adapters.num_modules) == ("adapters", "float32", 28)
    assert adapters.num_trainable == adapters.num_parameters > 0
    assert before.num_trainable == 0


def test_a_linear_that_should_be_4bit_and_is_not_fails_the_check(folder: Path) -> None:
    config = tiny_config()
    loaded = load_tiny(folder, config)
    loaded.model.set_submodule("model.language_model.layers.0.mlp.up_proj", nn.Linear(64, 128, bias=False))
    receipt = make_receipt(loaded.model, loaded.spec, config)
    with pytest.raises(
        UnsupportedModel,
        match=r"layers\.0\.mlp\.up_proj is unquantised, not nf4 with double quantisation[\s\S]*nf4 with double",
    ):
        receipt.check()
    rows = [row for row in receipt.rows if row.group == "language linears"]
    assert [(row.is_4bit, row.num_modules) for row in rows] == [(True, 13), (False, 1)]


def test_other_settings_than_asked_fail_the_check(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config())
    for other, message in (
        ({"quantization": {"bnb_4bit_quant_type": "fp4"}}, "is nf4 with double quantisation, not fp4 with double"),
        ({"quantization": {"bnb_4bit_use_double_quant": False}}, "is nf4 with double quantisation, not nf4"),
        ({"method": "lora"}, "is nf4 with double quantisation, not unquantised"),
    ):
        receipt = make_receipt(loaded.model, loaded.spec, tiny_config({"training": other}))
        assert len(receipt.mismatches) == 14
        with pytest.raises(UnsupportedModel, match=message):
            receipt.check()


def test_json_holds_rows_and_totals(folder: Path) -> None:
    receipt = load_tiny(folder, tiny_config(), adapters=True).receipt
    data = json.loads(json.dumps(receipt.to_json()))
    assert Receipt.from_json(data) == receipt
    assert data["bytes_now"] == sum(row["bytes_now"] for row in data["rows"])
    assert data["mismatches"] == []
    assert {row["group"] for row in data["rows"]} == set(GROUPS) - {"other"}
    assert data["rows"][0]["is_4bit"] is True


def test_integer_weights_of_another_method_are_named_by_their_dtype(folder: Path) -> None:
    config = tiny_config()
    loaded = load_tiny(folder, config)
    layer = nn.Linear(64, 128, bias=False)
    layer.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    loaded.model.set_submodule("model.language_model.layers.0.mlp.up_proj", layer)
    receipt = make_receipt(loaded.model, loaded.spec, config)
    assert [mismatch.found for mismatch in receipt.mismatches] == ["int8"]
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt
