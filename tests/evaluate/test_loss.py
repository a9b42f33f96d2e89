"""The validation loss against the full logits of plain transformers, however the samples are grouped or shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from eightgig.data.batch import IGNORE_INDEX
from eightgig.data.loader import validation_batches
from eightgig.evaluate.loss import validation_loss


def _full_logits_loss_sum(scene: Any, samples: Any) -> tuple[float, int]:
    """Sum of -log p and number of targets, one sample at a time, from the whole model's logits in fp64."""
    total, num_targets = 0.0, 0
    model = scene.loaded.model.eval()
    for sample in samples:
        encoded = scene.encoder.encode(sample)
        with torch.no_grad():
            logits = model(input_ids=encoded.input_ids[None], **encoded.image_inputs).logits[0].double()
        log_p = functional.log_softmax(logits, dim=-1)
        for position in range(1, len(encoded.labels)):
            label = int(encoded.labels[position])
            if label != IGNORE_INDEX:
                total -= float(log_p[position - 1, label])
                num_targets += 1
    return total, num_targets


def _loss(scene: Any, samples: Any, batch_size: int, sum_over_processes: Any = None) -> float:
    batches = validation_batches(scene.encoder, samples, batch_size=batch_size)
    family = scene.loaded.spec.family
    return validation_loss(scene.loaded.model, family, batches, scene.compute, sum_over_processes)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_it_is_the_full_logits_mean_over_all_tokens(scene: Any, batch_size: int) -> None:
    total, num_targets = _full_logits_loss_sum(scene, scene.samples)
    assert num_targets > 7 * 4
    assert _loss(scene, scene.samples, batch_size) == pytest.approx(total / num_targets, rel=1e-5)


def test_processes_weigh_by_their_tokens(scene: Any) -> None:
    mine, others = scene.samples[:2], scene.samples[2:]
    other_sums = torch.tensor(_full_logits_loss_sum(scene, others), dtype=torch.float64)
    asked: list[torch.Tensor] = []

    def add_other_process(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums)
        return sums + other_sums

    assert _loss(scene, mine, 1, add_other_process) == pytest.approx(_loss(scene, scene.samples, 1), rel=1e-5)
    assert asked[0].tolist() == pytest.approx(list(_full_logits_loss_sum(scene, mine)), rel=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_is_left_as_it_was_and_dropout_is_off(scene: Any, is_training: bool) -> None:
    model = scene.loaded.model
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    layer = model.get_base_model().model.language_model.layers[0]
    layer_handle = layer.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    model.train(is_training)
    first = _loss(scene, scene.samples[:2], 2)
    assert model.training is is_training
    assert layer.training is is_training
    handle.remove()
    layer_handle.remove()
    assert modes
    assert not any(modes)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert _loss(scene, scene.samples[:2], 2) == first
    model.eval()
