"""A vision tower in 4 bits, for every family: which layers, their values, training, the proof, and how much it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case
from torch import nn

from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.memory.cached_tower import tower_features, tower_of
from eightgig.models.load import LoadedModel
from eightgig.models.tower_in_4bit import tower_difference, tower_weights_kept
from eightgig.registry.family import ModelFamily
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import load_tiny, tiny_config

ALWAYS_4BIT = ("qwen-vl",)


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
    return [dict(batch.to(torch.device("cpu"), dtype).model_inputs) for batch in batches]


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
    checks.check_training(case, trained)
    checks.check_reload(case, trained)
