"""The published folder through EightGig's own doors: 4-bit loading, receipt, three steps, and the adapter's names."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from qwen_vl_published import small_ranks, write_ranks
from safetensors.torch import load_file

from eightgig import registry
from eightgig.core.errors import CheckpointError, ConfigError, UnsupportedModel
from eightgig.export.adapter import save_adapter
from eightgig.models.load import LoadedModel
from tiny_training import load_tiny, text_loss, tiny_config, tiny_inputs, trainable

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
IMAGE_PX = 112


def _load(folder: Path, **sections: Any) -> LoadedModel:
    settings = {"training": {"lora": {"rank": 4, "alpha": 8}}, "data": {"image_size": IMAGE_PX}, **sections}
    return load_tiny(folder, tiny_config(settings), adapters=True)


@pytest.fixture(scope="module")
def trained(published: Path) -> tuple[LoadedModel, list[float]]:
    loaded = _load(published)
    loaded.model.train()
    inputs = tiny_inputs(loaded, num_images=2, image_px=IMAGE_PX)
    optimizer = torch.optim.AdamW(trainable(loaded.model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = text_loss(loaded, inputs)
        losses.append(loss.item())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loaded, losses


def test_three_steps_lower_the_loss(trained: tuple[LoadedModel, list[float]]) -> None:
    assert trained[1] == sorted(trained[1], reverse=True)
    assert trained[1][-1] < trained[1][0]


def test_the_receipt_says_that_the_tower_is_4_bit(trained: tuple[LoadedModel, list[float]]) -> None:
    rows = {(row.group, row.is_4bit): row.num_modules for row in trained[0].receipt.rows}
    assert rows[("language linears", True)] == 10
    assert rows[("vision tower", True)] == 8 + 5
    assert rows[("lm_head", False)] == 1


def test_adapters_are_saved_under_the_published_names(
    trained: tuple[LoadedModel, list[float]], published: Path, tmp_path: Path
) -> None:
    loaded = trained[0]
    save_adapter(loaded.model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.transformer.h.{layer}.{name}.lora_{part}.weight"
        for layer in range(2)
        for name in LAYERS
        for part in "AB"
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(published)
    base, _ = loaded.spec.family.load_model(str(published), dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path)
    restored = {name: value for name, value in again.named_parameters() if ".lora_" in name}
    learnt = {name: value for name, value in loaded.model.named_parameters() if ".lora_" in name}
    assert restored.keys() == learnt.keys()
    assert all(torch.equal(restored[name], learnt[name]) for name in learnt)


def test_the_image_size_changes_the_tower_alone(published: Path) -> None:
    loaded = _load(published)
    assert dict(loaded.processor.image_processor.size)["height"] == IMAGE_PX
    family, facts = loaded.spec.family, loaded.spec.facts
    assert family.num_image_tokens(facts, IMAGE_PX, width_px=9, height_px=900) == 256
    assert "256 tokens" in str(family.image_px_note(facts, IMAGE_PX))
    assert family.image_px_note(facts, 448) is None
    for wrong in (0, 13, 100, 449):
        with pytest.raises(ConfigError, match="multiple of the patch size, 14 px"):
            family.check_image_px(facts, wrong)


def test_both_published_models_are_known() -> None:
    chat, base = registry.get("Qwen/Qwen-VL-Chat"), registry.get("qwen-vl")
    assert (chat.name, base.name) == ("qwen-vl-chat", "qwen-vl")
    assert chat.facts.architecture == base.facts.architecture
    assert chat.facts.num_parameters == 9_656_935_168


def test_a_text_model_of_the_same_type_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen", "hidden_size": 4096, "num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="without a vision tower"):
        registry.resolve(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle", "empty"])
def test_a_damaged_shard_is_named(published: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    shard = folder / "pytorch_model-00002-of-00003.bin"
    whole, other = shard.read_bytes(), pickle.dumps(Path("x"))
    contents = {"cut": whole[: len(whole) // 2], "garbage": b"no archive", "pickle": other, "empty": b""}
    shard.write_bytes(contents[damage])
    with pytest.raises(CheckpointError, match="can't be read"):
        _load(folder)


def test_loading_asks_the_hub_for_no_conversion(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' switch for it, where the user has not set it."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    family = registry.get("qwen-vl-chat").family
    family.load_model(str(published))
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "0")
    family.load_model(str(published))
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "0"


def test_another_models_vocabulary_is_refused(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    write_ranks(folder / "qwen.tiktoken", small_ranks(600))
    with pytest.raises(UnsupportedModel, match=r"gives <imgpad> the id 816"):
        _load(folder)


def test_a_folder_without_a_vocabulary_is_refused(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(UnsupportedModel, match=r"has no tokenizer \(qwen\.tiktoken or tokenizer\.json\)"):
        _load(folder)
