"""Writes down every allocation of code that runs on fake tensors, as it would happen on a GPU."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eightgig.plan.categories import OTHER
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.fake_ops import FakeOps
from eightgig.plan.op_costs import TRANSFER, OpCost, op_cost

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_READ_SCALAR = aten._local_scalar_dense.default
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Ledger(Protocol):
    """Where allocations are written down: the run's trace, or the tape of one layer."""

    def alloc(self, size_bytes: int, category: str = ...) -> int:
        """Allocate a block for what `category` says and return its number."""

    def alloc_once(self, key: str, size_bytes: int) -> None:
        """Allocate, where `key` is new, a block that stays."""

    def label(self, block: int, category: str) -> None:
        """Put a block into another category, over its whole life."""

    def free(self, block: int) -> None:
        """Free a block."""

    def is_live(self, block: int) -> bool:
        """Whether there is such a block, and it was not freed yet."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records into `ledger` each storage that an operation makes, until its last reference goes.

    Tensors with values (token ids, masks, pixels) count like fake ones: on a GPU all of them would be there. What the
    GPU's own kernels take beside their outputs comes from `rules`. A number read from a fake tensor is zero: a loss, a
    norm, a count of overflows, none of which changes what is allocated. A flag is `flag`.

    Attributes:
        ledger: what new storages are written into; each is freed where it was written.
        category: what new storages are for.
        costs: what operations cost is added up here; None: it is not asked for.
        flag: what is read from a fake boolean; generation asks in one whether every answer has ended.
    """

    def __init__(self, ledger: Ledger, rules: CudaRules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.flag = False
        self.category = OTHER
        self.costs: Counter[OpCost] | None = None
        self._rules = rules
        self._fake_ops = FakeOps()
        self._is_paused = False
        self._left_out: frozenset[int] = frozenset()
        # The address of a live storage's C++ object -> where it is written down, and what frees it there.
        self._entries: dict[int, tuple[Ledger, int, weakref.finalize[Any, Any]]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # asked more often than all else together
        keywords = kwargs or {}
        if self._is_paused:
            return self._fake_ops.call(func, types, args, keywords)
        if func is _READ_SCALAR and isinstance(args[0], FakeTensor):
            return self.flag if args[0].dtype == torch.bool else torch.zeros((), dtype=args[0].dtype).item()
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if self._rules.concern(func):
            with self._rules.around(func, args, keywords, self.ledger):
                output = self._fake_ops.call(func, types, args, keywords)
                self._note(output)
        else:
            output = self._fake_ops.call(func, types, args, keywords)
            self._note(output)
        if self.costs is not None:
            cost = op_cost(func, args, keywords, output)
            if cost is not None:
                self.count(cost)
        return output

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled here, and torch's guard around each operation takes as long as writing it down."""
        return False

    def count(self, cost: OpCost) -> None:
        """Add `cost`, where costs are asked for."""
        if self.costs is not None:
            self.costs[cost] += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations are not written down."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextlib.contextmanager
    def leaving_out(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Inside, the storages of `tensors`, which live throughout, lie on the host; views of them are no blocks."""
        addresses = frozenset(tensor.untyped_storage()._cdata for tensor in tensors)
        entries = {address: self._entries.pop(address) for address in addresses}
        self._left_out = addresses
        try:
            yield
        finally:
            self._left_out = frozenset()
            self._entries |= entries

    def received(self, tensor: Tensor) -> Tensor:
        """`tensor`, which is on the host, as it arrives on the GPU."""
        with self.paused():
            arrived = tensor.clone()
        num_bytes = arrived.untyped_storage().nbytes()
        self.enter(arrived, self.ledger.alloc(num_bytes, self.category))
        self.count(OpCost(TRANSFER, arrived.dtype, 0, num_bytes))
        return arrived

    def enter(self, tensor: Tensor, block: int) -> None:
        """Take `tensor`'s storage, made while paused, for `block` of the ledger: it is freed there when it goes."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        self._entries[address] = (self.ledger, block, weakref.finalize(storage, self._free, address))

    def block_of(self, tensor: Tensor) -> int | None:
        """The block of `tensor`'s storage, None if it was never written down in the present ledger."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry[1] if entry is not None and entry[0] is self.ledger else None

    def label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Put the storages of `tensors` into `category`, as far as they are written down in the present ledger."""
        for tensor in tensors:
            block = None if tensor is None else self.block_of(tensor)
            if block is not None:
                self.ledger.label(block, category)

    def take_over(self, tensor: Tensor) -> int | None:
        """The block of `tensor`'s storage; from now on the caller frees it, not the end of the storage."""
        block = self.block_of(tensor)
        if block is not None:
            self._entries.pop(tensor.untyped_storage()._cdata)[2].detach()
        return block

    def continue_in(self, ledger: Ledger) -> None:
        """Write into `ledger` from now on, a copy of the present one or that which it was copied from.

        What lives now and stands there is freed there; the rest is forgotten.
        """
        for address, (_, block, finalizer) in list(self._entries.items()):
            if ledger.is_live(block):
                self._entries[address] = (ledger, block, finalizer)
            else:
                del self._entries[address]
                finalizer.detach()
        self.ledger = ledger

    def _note(self, output: Any) -> None:
        leaves = (output,) if isinstance(output, Tensor) else tree_leaves(output)
        for tensor in leaves:
            if isinstance(tensor, Tensor) and _device(tensor).type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._entries and storage._cdata not in self._left_out:
                    self.enter(tensor, self.ledger.alloc(storage.nbytes(), self.category))

    def _free(self, address: int) -> None:
        ledger, block, _ = self._entries.pop(address)
        ledger.free(block)


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`indices` with each mask that has values written as positions: how many a fake tensor could not tell."""
    written: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            written.append(index)
        else:
            written += torch.nonzero(index, as_tuple=True)
    return written
