"""A card that is full at chosen operations, on the CPU: what the dispatcher is asked for raises instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FullAt(TorchDispatchMode):
    """Notes the operations inside, forward and backward, and raises out-of-memory instead of the `failing` one.

    Attributes:
        operations: names of those begun so far that have `among` in their name.
    """

    def __init__(self, failing: int | None = None, *, among: str = "") -> None:
        super().__init__()
        self.failing = failing
        self.among = among
        self.operations: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.among in str(func):
            self.operations.append(str(func))
            if len(self.operations) - 1 == self.failing:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Made up, in place of {func}.")
        return func(*args, **(kwargs or {}))
