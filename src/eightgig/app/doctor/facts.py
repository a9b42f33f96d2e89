"""What the doctor knows about a machine: plain values, so that a machine with any ailment can be made up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """Another program that has memory of the card; `used_bytes` is None where the driver does not say."""

    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class DriverFacts:
    """What the NVIDIA driver tells, without PyTorch.

    Attributes:
        version: the driver's.
        cuda_version: the newest CUDA it serves, (major, minor).
        card: the first card's name; None where it sees none. What follows is that card's.
        total_bytes: its memory.
        free_bytes: what no program has of it.
        others: programs on it.
        link_width: lanes of PCIe in use.
        max_link_width: lanes that card and slot both have.
    """

    version: str
    cuda_version: tuple[int, int]
    card: str | None = None
    total_bytes: int = 0
    free_bytes: int = 0
    others: tuple[Program, ...] = ()
    link_width: int | None = None
    max_link_width: int | None = None


@dataclass(frozen=True)
class TorchFacts:
    """What PyTorch tells.

    Attributes:
        version: PyTorch's.
        cuda_version: of CUDA in this build, as "12.8"; None in a build without.
        sees_card: whether it can compute on a card. What follows is that card's.
        card: its name.
        capability: its compute capability.
        architectures: that this build has kernels for, as "sm_86".
        total_bytes: of its memory.
        free_bytes: of its memory.
        has_bf16: whether card or CPU compute in bf16 themselves.
    """

    version: str
    cuda_version: str | None
    sees_card: bool
    has_bf16: bool
    card: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()
    total_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class ProductTrial:
    """What came of a product with a 4-bit weight.

    Attributes:
        device: where it ran.
        dtype: that it computed in.
        relative_error: size of the difference to the product with the weight read out by the definition of NF4, as a
            share of the latter; None where it failed.
        bound: what the dtype's rounding explains.
        failure: what was raised; empty where nothing was.
    """

    device: str
    dtype: str
    relative_error: float | None
    bound: float
    failure: str = ""


@dataclass(frozen=True)
class Requirement:
    """A package that EightGig stands on; `installed` is None where it is missing."""

    name: str
    wanted: str
    installed: str | None
    is_met: bool


@dataclass(frozen=True)
class DiskFacts:
    """The disk where runs are written; `failure` says why nothing could be written, `write_bytes_per_s` how fast."""

    folder: Path
    free_bytes: int
    write_bytes_per_s: float | None
    failure: str = ""


@dataclass(frozen=True)
class HubFacts:
    """What is here of the model hub: its folder, the registry's models in it, and whether the network is left alone."""

    folder: Path
    models: tuple[str, ...]
    is_offline: bool


@dataclass(frozen=True)
class MachineFacts:
    """All of it.

    Attributes:
        system: the operating system and its version.
        is_windows: whether it is Windows, whose driver spills to RAM without a word.
        python: its version.
        hidden_cards: the content of CUDA_VISIBLE_DEVICES, None where it is not set.
        driver: None without an NVIDIA driver.
        ram_total_bytes: the machine's memory.
        ram_free_bytes: what programs can have of it.
        pinned_bytes_per_s: how fast memory that was pinned for the trial went to the card; None where it failed, or
            where there is no card.
    """

    system: str
    is_windows: bool
    python: str
    hidden_cards: str | None
    requirements: tuple[Requirement, ...]
    driver: DriverFacts | None
    torch: TorchFacts
    product: ProductTrial
    ram_total_bytes: int
    ram_free_bytes: int
    pinned_bytes_per_s: float | None
    disk: DiskFacts
    hub: HubFacts
