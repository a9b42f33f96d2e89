"""The chunked, target-only loss equals the plain loss over full logits, in value and in gradient."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from eightgig.data.batch import IGNORE_INDEX
from eightgig.step.loss import Targets, target_loss_sum


def _case(seed: int, batch: int, sequence: int, share: float) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, sequence, 24, generator=generator, requires_grad=True)
    labels = torch.randint(0, 37, (batch, sequence), generator=generator)
    labels[torch.rand(batch, sequence, generator=generator) > share] = IGNORE_INDEX
    labels[0, -1] = 5  # at least one target, whatever the share
    head = nn.Linear(24, 37, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(37, 24, generator=generator))
    return hidden, labels, head


@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    sequence=st.integers(2, 40),
    share=st.floats(0.0, 1.0),
    chunk_tokens=st.integers(1, 50),
)
def test_chunked_target_loss_equals_full_logits_loss_and_gradient(
    seed: int, batch: int, sequence: int, share: float, chunk_tokens: int
) -> None:
    hidden, labels, head = _case(seed, batch, sequence, share)
    reference = functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 37).double(),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    expected_grads = torch.autograd.grad(reference, [hidden, head.weight])

    loss = target_loss_sum(hidden, Targets.from_labels(labels), head, chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(loss, [hidden, head.weight])

    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-5)
    for found, expected in zip(grads, expected_grads, strict=True):
        assert torch.linalg.norm(found - expected) <= 1e-5 * max(1.0, torch.linalg.norm(expected))


def test_full_logits_never_exist() -> None:
    hidden, labels, head = _case(1, 2, 40, 1.0)
    rows_seen: list[int] = []

    def counting_head(states: torch.Tensor) -> torch.Tensor:
        rows_seen.append(states.shape[0])
        return head(states)

    target_loss_sum(hidden, Targets.from_labels(labels), counting_head, chunk_tokens=7).backward()
    assert max(rows_seen) == 7
    # Each chunk once forward and once again in backward, and never a row without a target.
    assert sum(rows_seen) == 2 * len(Targets.from_labels(labels))


def test_targets_are_shifted_by_one() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 7, IGNORE_INDEX, 9], [3, IGNORE_INDEX, IGNORE_INDEX, 4]])
    targets = Targets.from_labels(labels)
    # Position 0 predicts label 1 and so on; the first label of a row (3) has nothing before it.
    assert targets.positions.tolist() == [0, 2, 6]
    assert targets.tokens.tolist() == [7, 9, 4]
