"""Levers on layers, on a CUDA device: the same gradients, memory that falls, and copies that are waited for."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava
from torch import Tensor

from eightgig import registry
from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.memory import layer_inputs
from eightgig.memory.host_copies import CudaTransfers, HostCopy, HostPieces
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.step.build import checkpoint_as_configured, offload_as_configured, tile_as_configured
from lever_numerics import Outcome, assert_as_exact_in_bf16, outcome_of, randomise_lora_b
from tiny_training import text_loss, tiny_inputs

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
NUM_LAYERS = 6
LONG = 240  # images: with their texts some 10,000 tokens, so that activations outweigh weights and workspaces
DELAY_CYCLES = 200_000_000  # of `torch.cuda._sleep`: some 0.1 s, far more than a layer of these takes

LEVERS: dict[str, dict[str, Any]] = {
    "fewer checkpointed": {"checkpointed_layers": 3},
    "offload": {"offload_layer_inputs": True},
    "tiles": {"mlp_tile_tokens": 37},
    "tiles of projections too": {"mlp_tile_tokens": 37, "tiled_projections": True},
    "tiles in whole layers": {"mlp_tile_tokens": 37, "gradient_checkpointing": False},
    "all": {"checkpointed_layers": 4, "offload_layer_inputs": True, "mlp_tile_tokens": 37},
}


class DelayedCopies(CudaTransfers):
    """Copies that begin late and go to poisoned memory: whoever does not wait for them reads NaN."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.host = _PoisonedPieces(self)

    def send(self, tensor: Tensor) -> HostCopy:
        self._delay()
        return super().send(tensor)

    def fetch(self, copy: HostCopy) -> Tensor:
        poison = torch.full(copy.shape, float("nan"), dtype=copy.dtype, device=copy.device)
        del poison  # the memory that the next tensor of this shape gets
        self._delay()
        return super().fetch(copy)

    def _delay(self) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(DELAY_CYCLES)


class _PoisonedPieces(HostPieces):
    """Pinned memory that gets NaN, on the stream of the copies, as soon as it may be written again."""

    def __init__(self, transfers: CudaTransfers) -> None:
        super().__init__(pins=True)
        self._transfers = transfers
        self._poison = torch.full((1,), 0xFF, dtype=torch.uint8, device=CUDA)

    def give_back(self, pieces: list[Tensor]) -> None:
        with torch.cuda.stream(self._transfers._stream):
            for piece in pieces:
                piece.copy_(self._poison.expand_as(piece), non_blocking=True)
        super().give_back(pieces)


class HastyCopies(DelayedCopies):
    """The same without a wait for what comes back."""

    def wait_until_fetched(self, copy: HostCopy) -> None:
        """Not waited for."""


@dataclass(frozen=True)
class Run:
    """What a forward and a backward pass gave, and their peak of allocated bytes beyond what was there before."""

    outcome: Outcome
    peak_bytes: int


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs are offloaded too."""
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("levers") / "model", image_px=32, num_layers=NUM_LAYERS)


def _loaded(folder: Path, precision: str, transfers: CudaTransfers | None = None, **hardware: Any) -> LoadedModel:
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "training": {"lora": {"rank": 8, "alpha": 16, "dropout": 0.0}},
            "hardware": {"device": "cuda", "mixed_precision": precision, **hardware},
        }
    )
    spec = registry.resolve(config.model.name)
    loaded = load_model(config, spec, CUDA, choose_precision(MixedPrecision(precision), CUDA))
    attach_adapters(loaded, config)
    randomise_lora_b(loaded.model, seed=1)
    tile_as_configured(config, spec, loaded.model)
    checkpoint_as_configured(config, spec, loaded.model)
    offload_as_configured(config, spec, loaded.model, transfers)
    loaded.model.train()
    return loaded


def _run(loaded: LoadedModel, *, num_images: int = 3, seed: int = 0) -> Run:
    inputs = {name: value.to(CUDA) for name, value in tiny_inputs(loaded, num_images=num_images, seed=seed).items()}
    loaded.model.zero_grad()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = text_loss(loaded, inputs)
    loss.backward()
    torch.cuda.synchronize()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    outcome = outcome_of(loss, loaded.model)
    return Run(Outcome(outcome.loss.cpu(), {n: value.cpu() for n, value in outcome.gradients.items()}), peak_bytes)


@pytest.mark.parametrize("lever", LEVERS)
def test_gradients_are_as_exact_as_without(folder: Path, lever: str) -> None:
    exact = _run(_loaded(folder, "fp32")).outcome
    plain = _run(_loaded(folder, "bf16")).outcome
    assert_as_exact_in_bf16(_run(_loaded(folder, "bf16", **LEVERS[lever])).outcome, plain, exact)


def test_late_copies_into_poisoned_memory_change_no_gradient_over_several_steps(folder: Path) -> None:
    plain = _loaded(folder, "bf16")
    late = _loaded(folder, "bf16", DelayedCopies(CUDA), offload_layer_inputs=True)
    for seed, num_images in enumerate((3, 40, 1, 40)):
        ours, theirs = (_run(each, num_images=num_images, seed=seed).outcome for each in (late, plain))
        torch.testing.assert_close(ours.loss, theirs.loss)
        for name, value in theirs.gradients.items():  # kernels that add in any order differ in the last bits
            torch.testing.assert_close(ours.gradients[name], value, rtol=1e-2, atol=1e-3 * float(value.abs().max()))


def test_without_the_wait_the_gradients_are_wrong(folder: Path) -> None:
    hasty = _run(_loaded(folder, "bf16", HastyCopies(CUDA), offload_layer_inputs=True), num_images=40).outcome
    assert any(bool(value.isnan().any()) for value in hasty.gradients.values())


def test_layer_inputs_leave_the_card(folder: Path) -> None:
    """With MLPs in tiles the peak is where all inputs are kept; two of them stay."""
    kept = _loaded(folder, "bf16", mlp_tile_tokens=256)
    gone = _loaded(folder, "bf16", mlp_tile_tokens=256, offload_layer_inputs=True)
    _run(kept), _run(gone)  # workspaces
    num_tokens = tiny_inputs(kept, num_images=LONG)["input_ids"].numel()
    input_bytes = num_tokens * 64 * torch.bfloat16.itemsize
    saved = _run(kept, num_images=LONG).peak_bytes - _run(gone, num_images=LONG).peak_bytes
    assert saved >= (NUM_LAYERS - 3) * input_bytes


def test_tiles_take_less_the_smaller_they_are(folder: Path) -> None:
    peaks = []
    for tile in (None, 4096, 1024):
        loaded = _loaded(folder, "bf16", mlp_tile_tokens=tile, offload_layer_inputs=True)
        _run(loaded)
        peaks.append(_run(loaded, num_images=LONG).peak_bytes)
    assert peaks == sorted(set(peaks), reverse=True)


def test_the_host_memory_is_pinned_and_taken_once(folder: Path) -> None:
    transfers = CudaTransfers(CUDA)
    loaded = _loaded(folder, "bf16", transfers, offload_layer_inputs=True)
    _run(loaded, num_images=LONG)
    taken = transfers.host.num_bytes
    for seed in range(3):
        _run(loaded, num_images=LONG, seed=seed)
    assert transfers.host.num_bytes == taken
    assert transfers.host.is_pinned
    assert all(piece.is_pinned() for piece in transfers.host._free)
    assert len(transfers.host._free) * transfers.host._free[0].numel() == taken  # all came back
