"""Writes down every allocation of code that runs on fake tensors, as it would happen on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.trace import MemoryTrace

aten = torch.ops.aten
_READ_SCALAR = aten._local_scalar_dense.default
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records into `trace` each storage that an operation makes, until its last reference goes.

    Tensors with values (token ids, masks, pixels) count like fake ones: on a GPU all of them would be there. What the
    GPU's own kernels take beside their outputs comes from `rules`. A number read from a fake tensor is zero: a loss, a
    norm, a count of overflows, none of which changes what is allocated. A flag is `flag`.

    Attributes:
        flag: what is read from a fake boolean; generation asks in one whether every answer has ended.
    """

    def __init__(self, trace: MemoryTrace, rules: CudaRules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.flag = False
        self._rules = rules
        self._blocks: dict[int, int] = {}  # the address of a live storage's C++ object -> its block

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = dict(kwargs or {})
        if func is _READ_SCALAR and isinstance(args[0], FakeTensor):
            return self.flag if args[0].dtype == torch.bool else torch.zeros((), dtype=args[0].dtype).item()
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        with self._rules.around(func, args, keywords, self.trace):
            output = func(*args, **keywords)
            self._note(output)
        return output

    def _note(self, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note_storage(tensor.untyped_storage())

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._blocks:
            return
        self._blocks[address] = self.trace.alloc(storage.nbytes())
        weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.trace.free(self._blocks.pop(address))


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`indices` with each mask that has values written as positions: how many a fake tensor could not tell."""
    written: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            written.append(index)
        else:
            written += torch.nonzero(index, as_tuple=True)
    return written
