"""The levers that a run can switch on between two attempts at a step, and the order in which it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from eightgig.data.batch import MicroBatch
from eightgig.plan.chosen_levers import TILE_TOKENS

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig

Work = Literal["train", "validate", "save"]

# 128 rows of logits over 151,936 tokens (Qwen2.5) take 78 MB in fp32, about what one layer of a 7B model keeps; fewer
# rows would make the head's matrix products inefficient.
LOSS_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class PassSize:
    """The largest forward pass of what ran out of memory.

    Attributes:
        num_samples: that go through together.
        num_tokens: with padding; None where it was not counted.
        num_target_tokens: on which a loss is taken; None where they were not counted.
    """

    num_samples: int
    num_tokens: int | None = None
    num_target_tokens: int | None = None

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> PassSize:
        """The most of each among `micro_batches`."""
        return cls(
            num_samples=max(len(batch.sample_ids) for batch in micro_batches),
            num_tokens=max(batch.labels.numel() for batch in micro_batches),
            num_target_tokens=max(batch.num_target_tokens for batch in micro_batches),
        )


@dataclass(frozen=True)
class RunLevers:
    """The levers that a running model can change; the names are those of the settings.

    Attributes:
        samples_at_once: the most samples in one forward pass; None = as many as the config says. A step's samples, and
            so what it learns from, stay the same.
    """

    gradient_checkpointing: bool
    checkpointed_layers: int | None
    offload_layer_inputs: bool
    loss_chunk_tokens: int
    mlp_tile_tokens: int | None
    samples_at_once: int | None = None

    @classmethod
    def of(cls, config: TrainingConfig) -> RunLevers:
        """Those of `config`."""
        levers = config.hardware.levers
        return cls(
            gradient_checkpointing=config.hardware.gradient_checkpointing,
            checkpointed_layers=levers.checkpointed_layers,
            offload_layer_inputs=levers.offload_layer_inputs,
            loss_chunk_tokens=config.training.loss_chunk_tokens,
            mlp_tile_tokens=levers.mlp_tile_tokens,
        )

    def in_config(self, config: TrainingConfig) -> TrainingConfig:
        """`config` with these levers on the layers."""
        changes = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "checkpointed_layers": self.checkpointed_layers,
            "offload_layer_inputs": self.offload_layer_inputs,
            "mlp_tile_tokens": self.mlp_tile_tokens,
        }
        return config.model_copy(update={"hardware": config.hardware.model_copy(update=changes)})


def next_levers(levers: RunLevers, work: Work, size: PassSize, *, can_tile: bool) -> tuple[str, RunLevers] | None:
    """The next lever for `work`, in words, and the levers with it; None where all that could help are on.

    First those that leave every number as it is, then those that only round differently, each the cheaper one first.
    Checkpoints are copied to the host tensor by tensor: no lever makes that smaller.
    """
    if work == "save":
        return None
    steps = _for_all_passes(levers, size, can_tile=can_tile)
    if work == "train":
        return next(_for_graphs(levers), None) or next(steps, None)
    return next(steps, None)


def _for_graphs(levers: RunLevers) -> Iterator[tuple[str, RunLevers]]:
    """Levers on what is kept for a backward pass."""
    if not levers.gradient_checkpointing or levers.checkpointed_layers is not None:
        changed = replace(levers, gradient_checkpointing=True, checkpointed_layers=None)
        yield "all layers are checkpointed", changed
    if not levers.offload_layer_inputs:
        yield "layer inputs wait on the host", replace(levers, offload_layer_inputs=True)


def _for_all_passes(levers: RunLevers, size: PassSize, *, can_tile: bool) -> Iterator[tuple[str, RunLevers]]:
    """Levers on what exists while a pass computes."""
    targets = size.num_target_tokens
    if levers.loss_chunk_tokens > LOSS_CHUNK_TOKENS and (targets is None or targets > LOSS_CHUNK_TOKENS):
        text = f"the loss is taken on {LOSS_CHUNK_TOKENS} tokens at a time"
        yield text, replace(levers, loss_chunk_tokens=LOSS_CHUNK_TOKENS)
    if size.num_samples > 1:
        half = -(-size.num_samples // 2)
        noun = "sample goes" if half == 1 else "samples go"
        yield f"{half} {noun} through at a time", replace(levers, samples_at_once=half)
    is_long = size.num_tokens is None or size.num_tokens > TILE_TOKENS
    if can_tile and is_long and (levers.mlp_tile_tokens or TILE_TOKENS + 1) > TILE_TOKENS:
        yield f"MLPs take {TILE_TOKENS:,} tokens at a time", replace(levers, mlp_tile_tokens=TILE_TOKENS)
