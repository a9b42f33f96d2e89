"""Tensors copied from a device to the host and back, beside what the device computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eightgig.core.logging import get_logger
from eightgig.core.units import MIB

# PyTorch rounds pinned memory up to a power of two (CachingHostAllocator), to nearly twice what is needed; so it is
# taken in pieces of one, and what is lost is the rest of a tensor's last piece.
PIECE_BYTES = 4 * MIB

logger = get_logger(__name__)


class HostPieces:
    """Memory of the host in pieces of PIECE_BYTES, pinned where that can be had; what is given back is taken again.

    Attributes:
        num_bytes: taken from the system so far, for good.
        is_pinned: False from the moment at which pinning failed.
    """

    def __init__(self, *, pins: bool) -> None:
        self.num_bytes = 0
        self.is_pinned = pins
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> list[Tensor]:
        """Pieces, uint8, that hold `num_bytes` together."""
        return [self._free.pop() if self._free else self._piece() for _ in range(-(-num_bytes // PIECE_BYTES))]

    def give_back(self, pieces: list[Tensor]) -> None:
        """Take `pieces` back, and empty the list."""
        self._free += pieces
        pieces.clear()

    def _piece(self) -> Tensor:
        self.num_bytes += PIECE_BYTES
        if self.is_pinned:
            try:
                return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.is_pinned = False
                reason = str(error).partition("\n")[0]
                logger.warning(
                    "no more than %d MiB of the host's memory could be pinned (%s): what else leaves the card goes to "
                    "ordinary memory, and each copy is waited for; training is slower, its result the same",
                    (self.num_bytes - PIECE_BYTES) // MIB,
                    reason,
                )
        return torch.empty(PIECE_BYTES, dtype=torch.uint8)


@dataclass(eq=False)
class HostCopy:
    """A tensor's bytes on the host, contiguous.

    Attributes:
        pieces: that hold them.
        is_ended: whether they were given up.
        left: when they were written, on a GPU.
        returned: when they were read, on a GPU; None before `Transfers.fetch`.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    pieces: list[Tensor] = field(default_factory=list)
    is_ended: bool = False
    left: torch.cuda.Event | None = None
    returned: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize


class Transfers:
    """Copies to the host and back; on a CPU plain ones, which have ended when they return."""

    def __init__(self, *, pins: bool = False) -> None:
        self.host = HostPieces(pins=pins)

    def send(self, tensor: Tensor) -> HostCopy:
        """Begin to copy `tensor`, contiguous. It must stay as it is until `wait_until_sent`."""
        copy = HostCopy(tensor.shape, tensor.dtype, tensor.device)
        copy.pieces = self.host.take(copy.num_bytes)
        for piece, part in _paired(copy, tensor):
            piece.copy_(part)
        return copy

    def wait_until_sent(self, copy: HostCopy) -> None:
        """Have what the device computes from now on begin when `copy` has left; only then may its memory be used."""

    def fetch(self, copy: HostCopy) -> Tensor:
        """A tensor on the device, into which `copy` begins to be copied. Read it after `wait_until_fetched`."""
        tensor = torch.empty(copy.shape, dtype=copy.dtype, device=copy.device)
        for piece, part in _paired(copy, tensor):
            part.copy_(piece)
        return tensor

    def wait_until_fetched(self, copy: HostCopy) -> None:
        """Have what the device computes from now on begin when `copy` has been read."""

    def end(self, copy: HostCopy) -> None:
        """Give up `copy`, fetched or not: its pieces may be written, and what it was fetched into may be freed."""
        if not copy.is_ended:
            copy.is_ended = True
            self.wait_until_fetched(copy)
            self.host.give_back(copy.pieces)


class CudaTransfers(Transfers):
    """Copies on a stream of their own.

    All of them are on this one stream, so that a piece is written again only after it was read. What they are copied
    into on the card belongs to the stream that computes: each copy begins after what was issued to that stream before,
    the memory's former use among it, and it is freed after a wait for the copy.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(pins=True)
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, tensor: Tensor) -> HostCopy:
        """Begin to copy `tensor`, contiguous. It must stay as it is until `wait_until_sent`."""
        copy = HostCopy(tensor.shape, tensor.dtype, tensor.device)
        copy.pieces = self.host.take(copy.num_bytes)
        with self._beside():
            for piece, part in _paired(copy, tensor):
                piece.copy_(part, non_blocking=piece.is_pinned())
            copy.left = self._stream.record_event()
        return copy

    def wait_until_sent(self, copy: HostCopy) -> None:
        """Have what the device computes from now on begin when `copy` has left; only then may its memory be used."""
        if copy.left is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.left)

    def fetch(self, copy: HostCopy) -> Tensor:
        """A tensor on the device, into which `copy` begins to be copied. Read it after `wait_until_fetched`."""
        tensor = torch.empty(copy.shape, dtype=copy.dtype, device=copy.device)
        with self._beside():
            for piece, part in _paired(copy, tensor):
                part.copy_(piece, non_blocking=piece.is_pinned())
            copy.returned = self._stream.record_event()
        return tensor

    def wait_until_fetched(self, copy: HostCopy) -> None:
        """Have what the device computes from now on begin when `copy` has been read."""
        if copy.returned is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.returned)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """The copies' stream, after all that was issued to the stream that computes."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield


def transfers_of(device: torch.device) -> Transfers:
    """Transfers between `device` and the host."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers()


def _paired(copy: HostCopy, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The pieces of `copy` beside the bytes of `tensor` that belong into them."""
    parts = torch.split(tensor.detach().view(-1).view(torch.uint8), PIECE_BYTES)
    for piece, part in zip(copy.pieces, parts, strict=True):
        yield piece[: part.numel()], part
