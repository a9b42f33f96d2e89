"""Weights on the host in every family: the loss and the gradients of a model that keeps all on its device."""

from __future__ import annotations

import pytest
import torch
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case
from torch import Tensor

from eightgig.core.errors import ConfigError
from eightgig.data.batch import MicroBatch
from eightgig.data.encode import Encoder
from eightgig.data.loader import validation_batches
from eightgig.memory import streaming, weight_ring
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.host_weights import keep_on_host
from eightgig.models.load import LoadedModel
from eightgig.registry.family import base_model
from eightgig.step.step import Compute, batch_loss_sum
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import CPU, gradients, load_tiny, tiny_config, trainable

COMPUTE = Compute(CPU, torch.float32, None, 64)
CONFIG = tiny_config({"training": {"lora": {"rank": 4, "alpha": 8}}})
ON_HOST = tiny_config({"hardware": {"device": "cpu", "embedding_on_host": True}})


@pytest.fixture(scope="module", params=all_tiny_families(), ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: TinyFamily = request.param
    root = tmp_path_factory.mktemp(tiny.name)
    return Case(tiny, build_tiny_family(tiny, root / "model"), checks.write_samples(root / "data"), root / "work")


def _loaded(case: Case) -> LoadedModel:
    loaded = load_tiny(case.folder, CONFIG, adapters=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    loaded.model.train()
    return loaded


def _passes(loaded: LoadedModel, batches: list[MicroBatch]) -> tuple[list[float], dict[str, Tensor]]:
    losses = []
    torch.manual_seed(5)  # InstructBLIP's Q-Former has dropout
    for batch in batches:
        loss = batch_loss_sum(loaded.model, loaded.spec.family, batch, COMPUTE)
        loss.backward()
        losses.append(loss.item())
    return losses, gradients(loaded.model)


def test_every_family_trains_with_its_weights_on_the_host(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _loaded(case)
    encoder = Encoder(plain.processor, plain.spec.family, max_length=512)
    batches = list(validation_batches(encoder, case.samples, batch_size=2))
    losses, expected = _passes(plain, batches)
    ours = _loaded(case)
    layers = ours.spec.family.decoder_layers(ours.model)
    checkpoint_layers(ours.model, layers, preserve_rng_state=False)
    # Tiny models have few layers. With one buffer each of them overwrites the one before.
    monkeypatch.setattr(weight_ring, "NUM_SLOTS", 1)
    monkeypatch.setattr(streaming, "NUM_SLOTS", 1)
    streamed = StreamedWeights(layers, CPU)
    tables = ours.spec.family.host_tables(ours.model)
    head = base_model(ours.model).get_submodule(ours.spec.family.modules.lm_head)
    if any(table.weight is head.weight for table in tables):
        with pytest.raises(ConfigError, match="its head computes with the same table"):
            keep_on_host(ON_HOST.hardware, ours.spec, ours.model, CPU)
    else:
        assert keep_on_host(ON_HOST.hardware, ours.spec, ours.model, CPU) is None
        assert all("forward" in vars(table) for table in tables)
    ours_losses, gradient = _passes(ours, batches)
    assert streamed.moved_bytes > streamed.host_bytes
    assert ours_losses == pytest.approx(losses, rel=1e-5)
    assert gradient.keys() == expected.keys()
    for name, right in expected.items():
        scale = float(right.abs().max())
        torch.testing.assert_close(gradient[name], right, rtol=1e-5, atol=1e-5 * scale + 1e-12, msg=name)
