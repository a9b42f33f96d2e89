"""Every family, tiny: the fused adapters give PEFT's loss and gradients, and each group that it names is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tests.registry import family_checks as checks
from tests.registry.family_checks import Case
from torch import Tensor

from eightgig.config import MixedPrecision
from eightgig.data.encode import Encoder
from eightgig.models import fused_lora
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import load_model
from eightgig.models.precision import Precision
from eightgig.step.build import checkpoint_as_configured, fuse_lora_as_configured
from eightgig.step.step import Compute, batch_loss_sum
from lever_numerics import FP32_TOLERANCE, Outcome, outcome_of, randomise_lora_b
from tiny_family import TinyFamily, all_tiny_families, build_tiny_family
from tiny_training import CPU, tiny_config

FP64_TOLERANCE = 1e-10
OWN_ERRORS = 4  # times PEFT's own fp32 error against fp64: the tiny Gemma 4 makes 1e-5 of one rounding


@pytest.fixture(scope="module", params=all_tiny_families(), ids=lambda tiny: tiny.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    tiny: TinyFamily = request.param
    root = tmp_path_factory.mktemp(tiny.name)
    return Case(tiny, build_tiny_family(tiny, root / "model"), checks.write_samples(root / "data"), root / "work")


def _outcome(case: Case, method: str, dtype: torch.dtype, *, fused: bool) -> tuple[Outcome, Any]:
    """With checkpointing where it is fused."""
    training = {"method": method, "lora": {"rank": 4, "alpha": 8}}
    config = tiny_config({"training": training, "hardware": {"fused_lora": fused, "gradient_checkpointing": fused}})
    loaded = load_model(config, case.spec, CPU, Precision(torch.float32, MixedPrecision.FP32, None))
    attach_adapters(loaded, config)
    randomise_lora_b(loaded.model, seed=7)
    if dtype is torch.float64:
        loaded.model.double()
    fuse_lora_as_configured(config, case.spec, loaded.model)
    checkpoint_as_configured(config, case.spec, loaded.model)
    encoder = Encoder(loaded.processor, case.spec.family, max_length=512)
    batch = checks._collated([encoder.encode(sample) for sample in case.samples], encoder)
    loaded.model.train()
    torch.manual_seed(0)  # InstructBLIP's Q-Former has dropout
    compute = Compute(device=CPU, input_dtype=dtype, autocast_dtype=None, loss_chunk_tokens=7)
    loss = batch_loss_sum(loaded.model, case.spec.family, batch, compute)
    loss.backward()
    return outcome_of(loss, loaded.model), loaded


def _error(ours: Outcome, reference: Outcome) -> float:
    """The largest difference by the largest value of its tensor."""
    expected = reference.tensors()
    assert ours.gradients.keys() == reference.gradients.keys()
    assert all(bool(value.any()) for value in expected.values())
    return max(
        float((value - expected[name]).abs().max() / expected[name].abs().max())
        for name, value in ours.tensors().items()
    )


def test_losses_and_gradients_are_those_of_peft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = _outcome(case, "lora", torch.float64, fused=False)
    assert _error(_outcome(case, "lora", torch.float64, fused=True)[0], exact) <= FP64_TOLERANCE
    own_error = _error(_outcome(case, "lora", torch.float32, fused=False)[0], exact)
    calls: list[int] = []
    compute = fused_lora.lora_linears

    def counted(hidden: Tensor, linears: Sequence[Any]) -> tuple[Tensor, ...]:
        calls.append(len(linears))
        return compute(hidden, linears)

    monkeypatch.setattr(fused_lora, "lora_linears", counted)
    ours, loaded = _outcome(case, "qlora", torch.float32, fused=True)
    monkeypatch.undo()
    plain, _ = _outcome(case, "qlora", torch.float32, fused=False)
    assert _error(ours, plain) <= max(FP32_TOLERANCE, OWN_ERRORS * own_error)
    assert Counter(calls) == Counter(2 * _groups(case, loaded.model))


def _groups(case: Case, model: Any) -> list[int]:
    """How many layers share each input of a forward pass."""
    sizes = []
    for layer in case.spec.family.decoder_layers(model):
        shared = [len(group) for group in case.spec.family.linears_of_one_input(layer) if group]
        num_layers = sum(isinstance(module, LoraLayer) for module in layer.modules())
        sizes += [*shared, *[1] * (num_layers - sum(shared))]
    return sizes
