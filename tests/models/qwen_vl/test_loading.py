"""The published layout into the model: through transformers' own loader, in 16 bits and in 4, and back out."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import qwen_vl_golden as golden
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from eightgig.models.quantization import disable_cpu_repacking
from eightgig.models.qwen_vl.modeling import QwenVLForConditionalGeneration

RESAMPLER = "transformer.visual.attn_pool.attn"


def _load(folder: Path, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    loaded: tuple[Any, dict[str, Any]] = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, **arguments
    )
    return loaded


def test_every_published_tensor_arrives(model: Any, published: Path) -> None:
    loaded, loading = _load(published, dtype=torch.bfloat16)
    assert type(loaded) is type(model) is QwenVLForConditionalGeneration
    assert {name: found for name, found in loading.items() if found} == {}
    stacked = golden.stacked(loaded.state_dict())
    weights = golden.published_weights()
    assert set(stacked) == set(weights)
    assert all(torch.equal(stacked[name], weights[name].bfloat16()) for name in weights)


def test_saving_writes_the_published_names_and_values(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    written, weights = load_file(tmp_path / "model.safetensors"), golden.published_weights()
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], weights[name].float()) for name in weights)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {key: config["visual"][key] for key in golden.CONFIG["visual"]} == golden.CONFIG["visual"]
    assert config["model_type"] == "qwen"
    reloaded, loading = _load(tmp_path)
    assert {name: found for name, found in loading.items() if found} == {}
    assert all(map(torch.equal, reloaded.parameters(), model.parameters()))


def test_all_linear_layers_but_the_head_can_be_4_bit(published: Path) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    quantised, loading = _load(published, dtype=torch.float32, quantization_config=quantization)
    assert {name: found for name, found in loading.items() if found} == {}
    plain = {path for path, module in quantised.named_modules() if type(module) is nn.Linear}
    assert plain == {"lm_head"}
    disable_cpu_repacking(quantised)
    twin = _load(published, dtype=torch.float32)[0]
    original = {name: value.clone() for name, value in twin.named_parameters()}
    with torch.no_grad():
        for path, module in quantised.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                error = (weight - original[f"{path}.weight"]).norm() / weight.norm()
                assert error < 0.15, path  # NF4's own error is 0.09 to 0.1 on normal weights
                twin.get_submodule(path).weight.copy_(weight)
        inputs = golden.case_inputs("two_images")
        difference = (quantised(**inputs).logits - twin(**inputs).logits).abs().max()
    assert difference < 1e-4


def test_a_shard_that_is_no_list_of_tensors_is_refused(published: Path, tmp_path: Path) -> None:
    """What a `.bin` file names must not run: only tensors may be read from it."""
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    mark = tmp_path / "ran"
    torch.save({"lm_head.weight": _Trap(mark)}, folder / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        _load(folder)
    assert not mark.exists()


class _Trap:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_shards_are_mapped_not_read_as_a_whole(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    load = torch.load

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    _load(published)
    assert len(calls) == 3
    assert all(call["mmap"] and call["weights_only"] and call["map_location"] == "cpu" for call in calls)


def test_the_published_config_keeps_what_it_does_not_use(published: Path) -> None:
    config = AutoConfig.from_pretrained(published)
    for key, value in golden.CONFIG.items():
        if key not in {"visual", "onnx_safe", "model_type"}:
            assert getattr(config, key) == value, key
    assert config.visual.mlp_width == 315
    assert config.image_token_id == golden.RECORD["special_ids"]["<imgpad>"]
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_new_models_first_values_are_as_published(model: Any) -> None:
    fresh = QwenVLForConditionalGeneration(model.config)
    pool = fresh.transformer.visual.attn_pool
    assert torch.equal(pool.pos_embed, golden.TENSORS["transformer.visual.attn_pool.pos_embed"])
    assert 0.015 < pool.query.std() < 0.025
    assert all(torch.isfinite(value).all() for value in fresh.parameters())
    assert torch.equal(fresh.transformer.ln_f.weight, torch.ones(128))
