"""What of a run lies in the host's memory, so that the simulation doesn't count it as the GPU's."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eightgig.data.batch import MicroBatch
from eightgig.memory.host_copies import HostCopy, Transfers
from eightgig.plan.op_costs import BESIDE, OpCost
from eightgig.plan.recorder import Recorder

_CPU = torch.device("cpu")
_COPY = torch.ops.aten._to_copy.default

MIN_PAGED_ELEMENTS = 100_000  # bitsandbytes' `Optimizer8bit.get_state_buffer`: smaller states are ordinary tensors


class HostBatch(MicroBatch):
    """A micro-batch in the host's memory: moving it makes new tensors, though the simulated GPU is the CPU too."""

    @classmethod
    def of(cls, batch: MicroBatch) -> HostBatch:
        """`batch`, on the host."""
        return cls(**{field.name: getattr(batch, field.name) for field in fields(batch)})

    def to(self, device: torch.device, float_dtype: torch.dtype) -> MicroBatch:
        """The batch on the GPU: each tensor a copy, that goes when the last reference to it does."""
        moved = super().to(device, float_dtype)
        copies = {name: _copied(tensor, self.model_inputs[name]) for name, tensor in moved.model_inputs.items()}
        values = {field.name: getattr(moved, field.name) for field in fields(moved)}
        return MicroBatch(**{**values, "model_inputs": copies, "labels": _copied(moved.labels, self.labels)})


class HostCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves copies to the host out of the record, and what is made of them; for code that saves.

    There `.to("cpu")` and tensors made of Python's numbers lie on the host, though the simulated GPU is the CPU too. A
    tensor that the record does not know lies there as well.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, keywords)) if isinstance(leaf, Tensor)]
        is_copy = func is _COPY and keywords.get("device") == _CPU
        if not is_copy and any(self._recorder.block_of(tensor) is not None for tensor in read):
            return func(*args, **keywords)
        with self._recorder.paused():
            return func(*args, **keywords)


class HostTransfers(Transfers):
    """Copies to the host, which take nothing of the card, and back, where each takes a tensor."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._modes: weakref.WeakKeyDictionary[HostCopy, Any] = weakref.WeakKeyDictionary()

    def send(self, tensor: Tensor) -> HostCopy:
        """What is left of `tensor` on the host: its shape."""
        copy = HostCopy(tensor.shape, tensor.dtype, tensor.device)
        self._modes[copy] = getattr(tensor, "fake_mode", contextlib.nullcontext())
        self._count(copy)
        return copy

    def fetch(self, copy: HostCopy) -> Tensor:
        """A tensor on the simulated card."""
        with self._modes[copy]:
            tensor = torch.empty(copy.shape, dtype=copy.dtype)
        self._count(copy)
        return tensor

    def _count(self, copy: HostCopy) -> None:
        self._recorder.count(OpCost(BESIDE, copy.dtype, 0, copy.num_bytes))


def keep_paged_states_on_host(optimizer: Optimizer, recorder: Recorder) -> None:
    """Leave the large states of a paged optimizer out of the record.

    They lie in managed memory that bitsandbytes asks CUDA for, not PyTorch's allocator. On the CPU, where the simulated
    parameters claim to lie, bitsandbytes would make ordinary tensors of them.
    """
    paged: Any = optimizer
    if not getattr(paged, "is_paged", False):
        return
    make_state = paged.get_state_buffer

    def state_of(parameter: nn.Parameter, dtype: torch.dtype = torch.float32) -> Tensor:
        if parameter.numel() < MIN_PAGED_ELEMENTS:
            small: Tensor = make_state(parameter, dtype=dtype)
            return small
        with recorder.paused():
            large: Tensor = make_state(parameter, dtype=dtype)
        return large

    paged.get_state_buffer = state_of


def _copied(moved: Tensor, source: Tensor) -> Tensor:
    return moved.clone() if moved is source else moved
