"""What the blocks of a run are for, as the breakdown of a plan names it."""

from __future__ import annotations

WEIGHTS_4BIT = "4-bit weights"
WEIGHTS_16BIT = "16-bit weights"  # all that is not in 4 bits; of full fine-tuning in fp32
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
LAYER_OUTPUTS = "layer outputs"  # each the input of the next, which checkpointing keeps
KEPT_FOR_BACKWARD = "kept for backward"  # what layers keep beyond their inputs
LAYER_AT_WORK = "layer at work"  # within one layer, in its backward pass also what is computed again
VISION = "vision tower"
LOSS = "logits and loss"
DEQUANTISED = "dequantised weight"
WORKSPACES = "library workspaces"
OTHER = "other tensors"
OVERHEAD = "allocator overhead"
CONTEXT = "CUDA context"

ORDER = (
    WEIGHTS_4BIT,
    WEIGHTS_16BIT,
    ADAPTERS,
    GRADIENTS,
    OPTIMIZER,
    LAYER_OUTPUTS,
    KEPT_FOR_BACKWARD,
    LAYER_AT_WORK,
    VISION,
    LOSS,
    DEQUANTISED,
    WORKSPACES,
    OTHER,
)
"""The categories of blocks, as they are drawn."""
