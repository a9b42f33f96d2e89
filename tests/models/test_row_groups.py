"""Several micro-batches a pass in every family: the loss and the gradients of one micro-batch after the other.

Where a row's loss depends on the others in its batch anyway, those of the same batch without groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case

from eightgig.data.encode import Encoder
from eightgig.data.loader import validation_batches
from eightgig.memory import layer_inputs, streaming, weight_ring
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.load import LoadedModel
from eightgig.step.build import (
    checkpoint_as_configured,
    group_rows_as_configured,
    offload_as_configured,
    tile_as_configured,
)
from eightgig.step.step import Compute, batch_loss_sum
from lever_numerics import Outcome, assert_close, outcome_of, randomise_lora_b
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import CPU, load_tiny, tiny_config

COMPUTE = Compute(CPU, torch.float32, None, 64)
LORA = {"training": {"lora": {"rank": 4, "alpha": 8}, "gradient_accumulation_steps": 4}}
TOGETHER = {"device": "cpu", "mixed_precision": "fp32", "micro_batches_per_pass": 4}


@pytest.fixture(scope="module", params=all_tiny_families(), ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: TinyFamily = request.param
    root = tmp_path_factory.mktemp(tiny.name)
    return Case(tiny, build_tiny_family(tiny, root / "model"), checks.write_samples(root / "data"), root / "work")


def _loaded(case: Case) -> LoadedModel:
    loaded = load_tiny(case.folder, tiny_config(LORA), adapters=True)
    randomise_lora_b(loaded.model, seed=7)
    for module in loaded.model.modules():  # InstructBLIP's Q-Former draws other numbers for other batches
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    loaded.model.train()
    return loaded


def _passes(loaded: LoadedModel, case: Case, sizes: Sequence[int]) -> Outcome:
    """The sum of the losses, and its gradients, of passes that hold so many samples each."""
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    total, begin = torch.zeros(()), 0
    for size in sizes:
        (batch,) = validation_batches(encoder, case.samples[begin : begin + size], batch_size=size)
        loss = batch_loss_sum(loaded.model, loaded.spec.family, batch, COMPUTE)
        loss.backward()
        total, begin = total + loss.detach(), begin + size
    return outcome_of(total, loaded.model)


def test_every_family(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every other lever on a layer; one buffer, so that each streamed layer overwrites the one before."""
    sizes = (3, 1)  # positions of three kinds, where a family has them, could be taken for three rows
    independent = case.tiny.family.rows_are_independent
    plain = _passes(_loaded(case), case, (1, 1, 1, 1) if independent else sizes)
    ours = _loaded(case)
    config = tiny_config({**LORA, "hardware": TOGETHER | {"offload_layer_inputs": True, "mlp_tile_tokens": 5}})
    monkeypatch.setattr(layer_inputs, "MIN_OFFLOADED_BYTES", 1)
    monkeypatch.setattr(weight_ring, "NUM_SLOTS", 1)
    monkeypatch.setattr(streaming, "NUM_SLOTS", 1)
    layers = ours.spec.family.decoder_layers(ours.model)
    streamed = StreamedWeights(layers, CPU)
    for engage in (
        tile_as_configured,
        checkpoint_as_configured,
        offload_as_configured,
        group_rows_as_configured,
    ):
        engage(config, ours.spec, ours.model)
    assert_close(_passes(ours, case, sizes), plain)
    a_pass = 2 * streamed.host_bytes - streamed.host_bytes // len(
        layers
    )  # the last layer is there when backward begins
    assert streamed.moved_bytes <= len(sizes) * a_pass + len(layers)
