"""Adapters computed together, on a CUDA device: as exact as PEFT's, in less memory, with fewer kernels."""

from __future__ import annotations

import gc
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava
from torch.profiler import ProfilerActivity, profile

from eightgig import registry
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.step.build import checkpoint_as_configured, fuse_lora_as_configured, tile_as_configured
from lever_numerics import BF16_ERROR_FACTOR, Outcome, assert_close, outcome_of, randomise_lora_b
from tiny_training import text_loss, tiny_inputs

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
NUM_LAYERS, NUM_DRAWS = 4, 6
LONG = 240  # images: with their texts some 10,000 tokens, so that activations outweigh weights and workspaces
WHOLE = {"gradient_checkpointing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("fused") / "model", image_px=32, num_layers=NUM_LAYERS)


def _loaded(folder: Path, precision: str, *, fused: bool, method: str = "qlora", **hardware: Any) -> LoadedModel:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "training": {"method": method, "lora": {"rank": 8, "alpha": 16}},
            "hardware": {"device": "cuda", "mixed_precision": precision, "fused_lora": fused, **hardware},
        }
    )
    spec = registry.resolve(config.model.name)
    loaded = load_model(config, spec, CUDA, choose_precision(MixedPrecision(precision), CUDA))
    attach_adapters(loaded, config)
    randomise_lora_b(loaded.model, seed=1)
    fuse_lora_as_configured(config, spec, loaded.model)
    tile_as_configured(config, spec, loaded.model)
    checkpoint_as_configured(config, spec, loaded.model)
    loaded.model.train()
    return loaded


def _outcome(loaded: LoadedModel, *, num_images: int = 3, seed: int = 0) -> Outcome:
    inputs = {name: value.to(CUDA) for name, value in tiny_inputs(loaded, num_images=num_images, seed=seed).items()}
    loaded.model.zero_grad()
    loss = text_loss(loaded, inputs)
    loss.backward()
    outcome = outcome_of(loss, loaded.model)
    return Outcome(outcome.loss.cpu(), {name: value.cpu() for name, value in outcome.gradients.items()})


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("hardware", [WHOLE, {}, {"mlp_tile_tokens": 37}, {"streamed_layers": NUM_LAYERS}])
def test_gradients_in_fp32_are_those_of_peft(folder: Path, method: str, hardware: dict[str, Any]) -> None:
    if method == "lora" and "streamed_layers" in hardware:
        hardware = {}  # only 4-bit weights are streamed
    plain = _outcome(_loaded(folder, "fp32", fused=False, method=method, **WHOLE))
    assert_close(_outcome(_loaded(folder, "fp32", fused=True, method=method, **hardware)), plain)


@pytest.mark.parametrize("hardware", [WHOLE, {}])
def test_bf16_errs_no_more_than_peft(folder: Path, hardware: dict[str, Any]) -> None:
    """Over several draws of adapters and pictures."""
    exact = _loaded(folder, "fp32", fused=False, **WHOLE)
    both = [_loaded(folder, "bf16", fused=fused, **hardware) for fused in (True, False)]
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for seed in range(NUM_DRAWS):
        for loaded in (exact, *both):
            randomise_lora_b(loaded.model, seed)
        right = _outcome(exact, num_images=8, seed=seed).gradients
        for place, loaded in enumerate(both):
            for name, value in _outcome(loaded, num_images=8, seed=seed).gradients.items():
                totals[name][place] += float(((value - right[name]).norm() / right[name].norm()) ** 2)
    for name, (error, own) in totals.items():
        assert (error / own) ** 0.5 <= BF16_ERROR_FACTOR, name


def _peak_bytes(loaded: LoadedModel) -> int:
    _outcome(loaded)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _outcome(loaded, num_images=LONG)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _num_kernels(loaded: LoadedModel) -> int:
    _outcome(loaded)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        _outcome(loaded)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


@pytest.mark.parametrize("hardware", [WHOLE, {}])
def test_it_takes_less_memory_and_fewer_kernels(folder: Path, hardware: dict[str, Any]) -> None:
    ours, plain = (_loaded(folder, "bf16", fused=fused, **hardware) for fused in (True, False))
    assert _peak_bytes(ours) < _peak_bytes(plain)
    assert _num_kernels(ours) < 0.9 * _num_kernels(plain)
