"""A vision tower in 4 bits, for every family: which layers, their values, training, the proof, what it changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case
from tests.tiny import build_tiny_llava
from torch import nn

from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError, UnsupportedModel
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.memory.cached_tower import tower_features, tower_of
from eightgig.models.load import LoadedModel
from eightgig.models.random_weights import random_tensor
from eightgig.models.receipt import Receipt, TowerDifference, make_receipt
from eightgig.models.tower_features import facts_key, tower_facts
from eightgig.models.tower_in_4bit import tower_difference, tower_weights_kept
from eightgig.registry import resolve
from eightgig.registry.family import ModelFamily
from lever_numerics import randomise_lora_b
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import CPU, gradients, load_tiny, text_loss, tiny_config, tiny_inputs


def config_of(*, tower: bool, precision: str = "fp32", **training: Any) -> TrainingConfig:
    lora = {"rank": 4, "alpha": 8}
    quantization = {"vision_tower": tower}
    sections = {"lora": lora, "batch_size": 2, "gradient_accumulation_steps": 2, "quantization": quantization}
    return tiny_config({"training": {**sections, **training}}, precision=precision)


@pytest.fixture(scope="module", params=all_tiny_families(), ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: TinyFamily = request.param
    root = tmp_path_factory.mktemp(tiny.name)
    samples = checks.write_samples(root / "data")
    return Case(tiny, build_tiny_family(tiny, root / "model"), samples, root / "work")


def linears(model: nn.Module, family: ModelFamily) -> dict[str, Any]:
    """All linear layers of the vision tower, by their paths in it."""
    modules = tower_of(model, family).named_modules()
    return {path: module for path, module in modules if isinstance(module, nn.Linear)}


def inputs_of(loaded: LoadedModel, case: Case) -> list[dict[str, Any]]:
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    batches = [
        collate([encoder.encode_prompt([sample.messages[0]])], encoder.pad_token_id, encoder.image_layout)
        for sample in case.samples
        if sample.images
    ]
    dtype = loaded.precision.compute_dtype
    return [dict(batch.to(CPU, dtype).model_inputs) for batch in batches]


def test_exactly_the_blocks_linear_layers_are_quantised_as_bitsandbytes_would(case: Case) -> None:
    """Beside the same model in 16 bits throughout, whose weights are quantised here."""
    family = case.tiny.family
    plain = linears(load_tiny(case.folder, config_of(tower=False, method="lora", quantization={})).model, family)
    loaded = load_tiny(case.folder, config_of(tower=True))
    found = linears(loaded.model, family)
    assert found.keys() == plain.keys()
    kept = {path for path, module in found.items() if type(module) is nn.Linear}
    projectors = tuple(f"{path}." for path in family.modules.projectors)
    tower = family.modules.towers[0]
    assert kept == {p for p in found if f"{tower}.{p}".startswith(projectors) or p == "patch_embedder.input_proj"}
    assert len(kept) < len(found)
    for path in found.keys() - kept:
        weight = found[path].weight
        packed, state = functional.quantize_4bit(
            plain[path].weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(weight.data, packed), path
        assert torch.equal(
            functional.dequantize_4bit(weight.data, weight.quant_state), functional.dequantize_4bit(packed, state)
        ), path
    rows = [row for row in loaded.receipt.rows if row.group == "vision tower" and row.is_4bit]
    assert [row.num_modules for row in rows] == [len(found) - len(kept)]
    assert "vision tower's" in loaded.receipt.asked


def test_the_difference_is_that_of_two_models_loaded_apart(case: Case) -> None:
    config = config_of(tower=True)
    with tower_weights_kept(config, case.spec) as originals:
        loaded = load_tiny(case.folder, config)
    quantised = {m for m in linears(loaded.model, case.tiny.family).values() if isinstance(m, bnb.nn.Linear4bit)}
    assert originals.keys() == quantised
    images = inputs_of(loaded, case)
    found = tower_difference(loaded, originals, images)
    plain = load_tiny(case.folder, config_of(tower=False, method="lora", quantization={}))
    errors, cosines = [], []
    for inputs in images:
        ours, theirs = (tower_features(m.model, m.spec.family, inputs).double() for m in (loaded, plain))
        errors.append(float((ours - theirs).norm() / theirs.norm()))
        cosines.append(float(nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)))
    assert found is not None
    assert found.num_images == len(images) == 3
    assert found.mean_relative_error == pytest.approx(sum(errors) / 3, rel=1e-4)
    assert found.worst_relative_error == pytest.approx(max(errors), rel=1e-4)
    assert found.mean_cosine == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert found.worst_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert 1e-4 < found.mean_relative_error <= found.worst_relative_error < 1
    again = tower_difference(loaded, originals, images)
    assert again == found  # the layers compute with 4 bits again
    assert tower_difference(loaded, originals, []) is None


def test_it_trains_and_plain_libraries_reload_the_adapter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CONFIG", config_of(tower=True))
    trained = checks.train(case)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in linears(trained.loaded.model, case.tiny.family).values())
    checks.check_reload(case, trained)


FP16 = [tiny for tiny in all_tiny_families() if tiny.name in ("qwen2_5_vl", "smolvlm", "gemma4")]


@pytest.mark.parametrize("tiny", FP16, ids=lambda tiny: tiny.name)
def test_it_trains_in_fp16(tiny: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers that ask their own layers for the dtype of pixels, each in another way."""
    monkeypatch.setattr(checks, "CONFIG", config_of(tower=True))
    samples = checks.write_samples(tmp_path / "data")
    checks.check_fp16(Case(tiny, build_tiny_family(tiny, tmp_path / "model"), samples, tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_llava(tmp_path / "model")


def test_random_weights_are_quantised_and_kept_too(folder: Path) -> None:
    config = config_of(tower=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"random_weights_seed": 5})})
    with tower_weights_kept(config, resolve(str(folder))) as originals:
        loaded = load_tiny(folder, config)
    found = linears(loaded.model, loaded.spec.family)
    assert originals.keys() == set(found.values())
    for path, module in found.items():
        name = f"model.vision_tower.{path}.weight"
        expected = random_tensor(name, originals[module].shape, seed=5, device=CPU, dtype=torch.float32)
        assert torch.equal(originals[module], expected)


def test_nothing_is_kept_of_a_tower_in_16_bits(folder: Path) -> None:
    with tower_weights_kept(config_of(tower=False), resolve(str(folder))) as originals:
        loaded = load_tiny(folder, config_of(tower=False))
    assert not originals
    assert all(type(module) is nn.Linear for module in linears(loaded.model, loaded.spec.family).values())


def test_adapters_on_the_tower_train_over_its_4bit_layers(folder: Path) -> None:
    """Their gradients are those over plain layers that hold the same values."""
    pattern = r"model\.vision_tower\..*\.(q_proj|fc1)"
    config = config_of(tower=True, lora={"rank": 4, "alpha": 8, "target_modules": pattern})
    loaded = load_tiny(folder, config, adapters=True)
    randomise_lora_b(loaded.model, seed=7)
    inputs = tiny_inputs(loaded)
    torch.autograd.backward(text_loss(loaded, inputs))
    found = gradients(loaded.model)
    assert found
    assert all("vision_tower" in name and bool(value.any()) for name, value in found.items())
    for module in list(loaded.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                setattr(module, name, unpacked(child))
    loaded.model.zero_grad(set_to_none=True)
    torch.autograd.backward(text_loss(loaded, inputs))
    for name, value in gradients(loaded.model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def unpacked(layer: Any) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), False)
    plain.bias = layer.bias
    return plain


def test_a_tower_without_a_layer_to_quantise_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve(str(folder))
    monkeypatch.setattr(type(spec.family), "keep_16bit_in_tower", (r"model\.vision_tower",))
    with pytest.raises(ConfigError, match=r"no linear layer of model\.vision_tower can be quantised"):
        load_tiny(folder, config_of(tower=True))


def test_a_tower_that_was_not_quantised_as_asked_fails_the_check(folder: Path) -> None:
    loaded = load_tiny(folder, config_of(tower=False))
    receipt = make_receipt(loaded.model, loaded.spec, config_of(tower=True))
    with pytest.raises(UnsupportedModel, match=r"vision_tower\.\S+ is unquantised, not nf4"):
        receipt.check()


def test_the_features_kept_of_it_are_not_those_of_the_16bit_tower(folder: Path) -> None:
    keys = set()
    for tower in (False, True):
        loaded = load_tiny(folder, config_of(tower=tower))
        keys.add(facts_key(tower_facts(loaded, loaded.processor, CPU, torch.float32, None)))
    assert len(keys) == 2


def test_the_receipt_keeps_the_difference_and_reads_older_ones(folder: Path) -> None:
    receipt = load_tiny(folder, config_of(tower=True)).receipt
    told = replace(receipt, tower_difference=TowerDifference(8, 0.03, 0.05, 0.999, 0.998))
    written = json.loads(json.dumps(told.to_json()))
    assert Receipt.from_json(written) == told
    del written["tower_difference"]
    assert Receipt.from_json(written) == receipt
