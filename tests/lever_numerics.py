"""How the numbers of a memory lever are compared with those of the plain path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FP32_TOLERANCE = 1e-5
BF16_ERROR_FACTOR = 1.2  # issue 5: each tensor's error against fp32, at most so many times the plain bf16 path's own


@dataclass(frozen=True)
class Outcome:
    """The loss of a forward pass and every gradient of its backward pass, by name."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, in fp64."""
        return {name: value.double() for name, value in {"loss": self.loss, **self.gradients}.items()}


def outcome_of(loss: Tensor, model: nn.Module) -> Outcome:
    """The loss, and copies of the gradients that its backward pass has left in `model`."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return Outcome(loss.detach().clone(), found)


def randomise_lora_b(model: nn.Module, seed: int) -> None:
    """Random adapters: with B of zeros, as PEFT makes it, no gradient of A would be compared."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))


def assert_close(ours: Outcome, reference: Outcome) -> None:
    """Within 1e-5 of the largest value of each tensor."""
    expected = reference.tensors()
    assert ours.gradients.keys() == reference.gradients.keys()
    assert all(bool(value.any()) for value in expected.values())
    for name, value in ours.tensors().items():
        largest = float(expected[name].abs().max())
        assert float((value - expected[name]).abs().max()) <= FP32_TOLERANCE * largest, name


def assert_as_exact_in_bf16(ours: Outcome, plain: Outcome, exact: Outcome) -> None:
    """The error of each tensor against `exact`, of fp32, at most 1.2 times that of `plain`, of bf16."""
    assert ours.gradients.keys() == plain.gradients.keys() == exact.gradients.keys()
    expected, by_plain = exact.tensors(), plain.tensors()
    for name, value in ours.tensors().items():
        error, own = (float((other - expected[name]).norm()) for other in (value, by_plain[name]))
        assert error <= BF16_ERROR_FACTOR * own, f"{name}: {error} against {own}"
