"""Cross-entropy on the target positions only, a chunk of them at a time, so that full logits never exist.

With 32,064 logits in fp32 a row of 1,088 tokens would take 133 MiB several times over (logits, their fp32 copy,
log-softmax and gradient), and most of those rows are prompt and image, where there is no loss at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eightgig.data.batch import IGNORE_INDEX

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Targets:
    """Where in the flattened [batch × sequence] hidden states a loss is taken, and on which token.

    Attributes:
        positions: int64 [targets], index of the hidden state that predicts the target.
        tokens: int64 [targets], the token to be predicted there.
    """

    positions: Tensor
    tokens: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor) -> Targets:
        """The targets of `labels` [batch, sequence] (not shifted): the state at position i predicts label i + 1.

        Call it on CPU labels: finding the positions on a GPU would stop the launch queue at every micro-batch.
        """
        shifted = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
        positions = torch.nonzero(shifted != IGNORE_INDEX).squeeze(1)
        return cls(positions, shifted[positions])

    def to(self, device: torch.device) -> Targets:
        """The same targets on `device`."""
        return Targets(self.positions.to(device, non_blocking=True), self.tokens.to(device, non_blocking=True))

    def __len__(self) -> int:
        return self.positions.numel()


def _chunk_loss_sum(hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    return functional.cross_entropy(head(hidden).float(), tokens, reduction="sum")


def target_loss_sum(hidden: Tensor, targets: Targets, head: Head, *, chunk_tokens: int) -> Tensor:
    """Sum over `targets` of -log p(token), an fp32 scalar.

    The logits of a chunk are made anew in the backward pass instead of being kept, so at most `chunk_tokens` rows of
    them exist at any time.

    Args:
        hidden: [batch, sequence, hidden], any float dtype.
        targets: on the device of `hidden`.
        head: maps [n, hidden] to logits [n, vocab].
        chunk_tokens: target positions per chunk, at least 1.
    """
    selected = hidden.flatten(0, 1).index_select(0, targets.positions)
    total = selected.new_zeros((), dtype=torch.float32)
    state_chunks, token_chunks = torch.split(selected, chunk_tokens), torch.split(targets.tokens, chunk_tokens)
    for states, tokens in zip(state_chunks, token_chunks, strict=True):
        if states.requires_grad:
            chunk = checkpoint(_chunk_loss_sum, states, tokens, head, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_loss_sum(states, tokens, head)
        total = total + chunk
    return total
