"""Loading: what is 4-bit and what not, what is trainable, what the tower keeps, and what is said when it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import tiny
import tiny_training
from eightgig import registry
from eightgig.config import MixedPrecision
from eightgig.core.errors import CheckpointError, ConfigError, DoesNotFit, EnvironmentProblem, UnsupportedModel
from eightgig.models import load
from eightgig.models.precision import choose_precision
from tiny_training import CPU, load_tiny, tiny_config, tiny_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exactly_the_language_models_linears_are_4bit(folder: Path, precision: str) -> None:
    loaded = load_tiny(folder, tiny_config(precision=precision))
    is_4bit = {path for path, module in loaded.model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert is_4bit == {f"model.language_model.layers.{layer}.{name}_proj" for layer in range(2) for name in names}
    for name, parameter in loaded.model.named_parameters():
        expected = torch.uint8 if name.removesuffix(".weight") in is_4bit else loaded.precision.compute_dtype
        assert parameter.dtype is expected, name
        assert not parameter.requires_grad
        assert not parameter.is_meta
    quantised = [module for module in loaded.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {module.weight.quant_state.quant_type for module in quantised} == {"nf4"}
    assert all(module.weight.quant_state.nested for module in quantised)
    assert {module.compute_dtype for module in quantised} == {loaded.precision.compute_dtype}
    assert {module.support_avx512bf16_for_cpu for module in quantised} == {False}


def test_4bit_weights_are_the_rounded_originals(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config())
    original = load_tiny(folder, tiny_config({"training": {"method": "lora"}})).model
    path = "model.language_model.layers.1.mlp.down_proj"
    weight = loaded.model.get_submodule(path).weight
    restored = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    error = (restored - original.get_submodule(path).weight).norm() / original.get_submodule(path).weight.norm()
    assert 0.05 < float(error) < 0.15  # NF4 of normal weights: 0.09
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert torch.equal(loaded.model.get_parameter(name), original.get_parameter(name))


def test_single_quantisation_and_fp4_are_what_they_say(folder: Path) -> None:
    quantization = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    loaded = load_tiny(folder, tiny_config({"training": {"quantization": quantization}}))
    state = loaded.model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)


def test_full_fine_tuning_trains_all_but_the_tower_in_fp32_on_a_cpu(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config({"training": {"method": "full", "lora": None}}, precision="bf16"))
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype is torch.float32
        assert parameter.requires_grad is not name.startswith("model.vision_tower."), name


@pytest.mark.parametrize(
    ("method", "device", "mixed", "expected"),
    [
        ("full", "cuda", "bf16", torch.bfloat16),
        ("full", "cuda", "fp16", torch.float32),
        ("full", "cpu", "bf16", torch.float32),
        ("lora", "cuda", "fp16", torch.float16),
        ("qlora", "cpu", "bf16", torch.bfloat16),
    ],
)
def test_weights_are_16bit_unless_a_scaler_or_a_cpu_trains_them(
    method: str, device: str, mixed: str, expected: torch.dtype
) -> None:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    precision = load.Precision(dtypes[mixed], MixedPrecision(mixed), None)
    assert load.weight_dtype(load.TrainingMethod(method), torch.device(device), precision) is expected


def test_the_frozen_tower_keeps_no_graph_and_a_trained_one_does(folder: Path) -> None:
    tower = load_tiny(folder, tiny_config()).model.model.vision_tower
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not tower(pixels).last_hidden_state.requires_grad
    next(tower.parameters()).requires_grad_(True)
    assert tower(pixels).last_hidden_state.requires_grad
    with torch.no_grad():
        assert not tower(pixels).last_hidden_state.requires_grad


def test_training_uses_no_cache_and_generation_does(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    inputs = tiny_inputs(loaded)
    assert loaded.model(**inputs).past_key_values is None
    lengths: list[int] = []
    handle = loaded.model.get_submodule("base_model.model.model.language_model").register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with_cache = loaded.model.generate(**inputs, **options)
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1]
    handle.remove()
    assert torch.equal(with_cache, loaded.model.generate(**inputs, **options, use_cache=False))


def test_image_size_reaches_model_and_processor(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config({"data": {"image_size": 48}}))
    inputs = tiny_inputs(loaded, image_px=48)
    assert loaded.spec.family.hidden_states(loaded.model, inputs).shape[:2] == inputs["input_ids"].shape
    assert dict(loaded.processor.image_processor.crop_size) == {"height": 48, "width": 48}


def test_an_image_size_off_the_grid_is_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size = 50: a multiple of the patch size, 8 px"):
        load_tiny(folder, tiny_config({"data": {"image_size": 50}}))


def test_a_folder_without_weights_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UnsupportedModel, match=r"has a config\.json but no weights"):
        load_tiny(tmp_path / "copy", tiny_config())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*processor_config.json", r"has no image processor settings \(processor_config\.json or preprocessor_config"),
        ("tokenizer.json", r"has no tokenizer \(tokenizer\.json or tokenizer\.model\)"),
    ],
)
def test_a_folder_without_processor_files_says_which(folder: Path, tmp_path: Path, pattern: str, message: str) -> None:
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(pattern))
    with pytest.raises(UnsupportedModel, match=message):
        load_tiny(tmp_path / "copy", tiny_config())


def test_a_processor_that_the_hub_does_not_hand_out_is_explained() -> None:
    """Offline (as all tests are): a registry model whose files are not in the cache."""
    with pytest.raises(EnvironmentProblem, match=r"llava-1\.5-7b-hf is not on this machine, and HF_HUB_OFFLINE"):
        load.load_processor(tiny_config(), registry.get("llava-1.5-7b"))


def test_weights_that_the_hub_does_not_hand_out_are_explained() -> None:
    precision = choose_precision(MixedPrecision.FP32, CPU)
    with pytest.raises(EnvironmentProblem, match=r"llava-1\.5-13b-hf is not on this machine, and HF_HUB_OFFLINE"):
        load.load_model(tiny_config(), registry.get("llava-1.5-13b"), CPU, precision)


def test_a_cut_off_weights_file_is_called_damaged(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"a weights file of .*copy is damaged"):
        load_tiny(tmp_path / "copy", tiny_config())


def test_missing_weights_are_never_replaced_by_random_ones(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    config["text_config"].pop("layer_types", None)
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"lacks 9 weights, among them model\.language_model\.layers\.2\."):
        load_tiny(tmp_path / "copy", tiny_config())


def test_the_trap_of_short_names_is_caught_by_the_receipt(folder: Path) -> None:
    """transformers 5 ignores names that are not full paths: tower and projector would be quantised in silence."""
    spec = registry.resolve(str(folder))
    config = tiny_config()
    quantization = load.quantization_config(config, spec, CPU, choose_precision(MixedPrecision.FP32, CPU))
    quantization.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
    model = load._from_pretrained(config, spec, CPU, torch.float32, quantization)
    receipt = load.make_receipt(model, spec, config)
    wrong = {mismatch.module for mismatch in receipt.mismatches}
    assert "model.multi_modal_projector.linear_1" in wrong
    assert len(wrong) == 14
    with pytest.raises(UnsupportedModel, match=r"is nf4 with double quantisation, not unquantised[\s\S]*and 9 more"):
        receipt.check()


def test_a_full_gpu_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*args: Any, **kwargs: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(DoesNotFit, match=r"does not fit into the cap of 7\.25 GiB"):
        load_tiny(folder, tiny_config({"hardware": {"device": "auto", "cap_gib": 7.25}}))


def test_the_packages_own_batch_helper_builds_what_the_processor_would(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config())
    inputs = tiny_training.tiny_inputs(loaded, num_images=2)
    assert int((inputs["input_ids"] == loaded.model.config.image_token_id).sum()) == 2 * 16
