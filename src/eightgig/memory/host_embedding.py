"""The table of input embeddings in host memory: rows are gathered there, and only they travel to the GPU."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def look_up_on_host(table: nn.Module) -> None:
    """Move `table` to host memory and have it looked up there, by wrapping its forward on that instance.

    The table is not pinned: the GPU never reads it. Looking up waits for the ids to arrive on the host, so the CPU
    can't run ahead of the GPU beyond the beginning of a forward pass.

    Args:
        table: takes ids, integer [...], and gives rows [..., width], which return to the ids' device.

    Raises:
        ValueError: the table is trained; its gradient would be wanted on the GPU.
    """
    if any(parameter.requires_grad for parameter in table.parameters()):
        raise ValueError("a table of embeddings in host memory must be frozen")
    table.to("cpu")
    forward = table.forward

    @functools.wraps(forward)
    def wrapped(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows: Tensor = forward(ids.to("cpu"), *args, **kwargs)
        return rows.to(ids.device)

    table.forward = wrapped
