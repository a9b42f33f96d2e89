"""Graphics cards by name: memory, rates and link of each, read from gpus.json. No torch here.

What the columns of gpus.json are, and where they come from:

- vram_gb: the size on the box.
- cuda_mib: the lowest total that CUDA was seen to report for the card under Linux (`torch.cuda.mem_get_info()[1]`), in
  MiB; cuda_mib_basis says by what, as quoted in public repositories in 2024 to 2026. Drivers differ by some MiB. Where
  the system was not named, the gap to nvidia-smi's total tells Linux: on Windows CUDA reports 1 MiB less than that
  (8187 and 8188 MiB on an RTX 4060), but there the desktop takes its part. The total is 1 to 8 % below the size on the
  box, and 8 to 9 % for GDDR6 with ECC (T4, L4, A10).
- cuda_mib_like, for a card without such a report: the card whose difference to the size on the box is taken for it. Of
  a GeForce card's compute capability that is the one which lacks most up to 16 GB; the A100 PCIe has its SXM version's.
- bandwidth_gb_per_s: published memory bandwidth, 1e9 B/s.
- matrix_tflop_per_s: dense fp16 and bf16 products with fp32 sums, 1e12 FLOP/s; null where it is not known. For GeForce
  cards CUDA cores x boost clock x FLOP per core and clock: 8 on Turing, 4 from Ampere on (Turing, GA102, Ada v2.02 and
  RTX Blackwell whitepapers), a half of what they do with fp16 sums. Else the data sheet's, not its figure for sparse
  matrices. rate_basis says which, and what versions of the card differ in.
- fp32_tflop_per_s: products in fp32 outside the tensor cores, as PyTorch makes them by default: CUDA cores x boost
  clock x 2. Of an RTX card that is a quarter (Turing) or a half (from Ampere on) of matrix_tflop_per_s.
- pcie_generation, pcie_lanes: the card's own link. A laptop or a slot may connect fewer lanes.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from eightgig.core.errors import ConfigError, Problem
from eightgig.core.units import GIB, MIB

# PCI Express base specification, 3.0 to 5.0: transfers per second and lane, one bit each, 128 of 130 being data.
PCIE_TRANSFERS_PER_S: Mapping[int, float] = {3: 8e9, 4: 16e9, 5: 32e9}
PCIE_DATA_SHARE = 128 / 130
# Published copies from pinned memory attain 80 to 90 % of the link (EightGig's survey, 2026); here the lower end. Some
# attain less: 7.8 to 9.4 GB/s of 15.8 (Soup, 4.0 x8), 32.4 of 63 (an RTX 5090 in WSL; 9.6 from pageable memory).
PCIE_ATTAINED_SHARE = 0.8

RESERVE_GIB = 0.4  # of a card, kept free for its other users: what a desktop takes; also the default of `eightgig plan`

SIZE = re.compile(r"(?<!\d)(\d{1,3})\s*gi?b")
PREFIX = re.compile(r"^(nvidia)?(geforce|tesla)?((rtx|gtx)(?=\d))?")


@dataclass(frozen=True)
class GpuFacts:
    """What is known of one graphics card; None stands for what is not.

    Attributes:
        name: the table's name, or `8 GiB card` for one of which only the memory is given.
        aliases: further names, as a user or the driver may write them; several cards may share one.
        vram_gb: the size on the box.
        vram_bytes: what CUDA reports as the card's memory; context, PyTorch and other programs share it.
        vram_basis: where `vram_bytes` comes from.
        bandwidth_bytes_per_s: published bandwidth of the card's memory.
        matrix_flop_per_s: dense fp16 and bf16 matrix products with fp32 sums, at the boost clock.
        fp32_flop_per_s: products in fp32 outside the tensor cores, at the boost clock.
        rate_basis: where `matrix_flop_per_s` comes from.
        pcie_bytes_per_s: what a copy between pinned memory and the card attains, one way.
        compute_capability: major and minor.
        has_bf16: whether it computes in bf16 itself; before 8.0 PyTorch emulates it, far slower.
    """

    name: str
    aliases: tuple[str, ...]
    vram_gb: int | None
    vram_bytes: int
    vram_basis: str
    bandwidth_bytes_per_s: float | None
    matrix_flop_per_s: float | None
    fp32_flop_per_s: float | None
    rate_basis: str | None
    pcie_bytes_per_s: float | None
    compute_capability: tuple[int, int] | None
    has_bf16: bool | None


@functools.cache
def all_gpus() -> tuple[GpuFacts, ...]:
    """Every card of the table, in its order: GeForce by generation, laptops, then data centre."""
    text = (files("eightgig.registry") / "gpus.json").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in json.loads(text)["cards"]}
    return tuple(_facts(row, rows) for row in rows.values())


def get_gpu(name: str, *, vram_bytes: int | None = None) -> GpuFacts:
    """The card called `name`, as a user or the driver writes it.

    Capitals, spaces, hyphens, `NVIDIA GeForce`, `RTX` and `GPU` don't matter; the memory's size may be added (`3060
    12GB`), and must be that of a card of the table. A laptop's GPU without its power limit is the slowest of that name,
    so that no time is promised which it can't keep.

    Args:
        name: what was typed or what the driver says.
        vram_bytes: the card's memory as measured, which tells apart versions that differ in size on the box.

    Raises:
        ConfigError: no card is called so, or several are (a size or a plug left open); the message names them.
    """
    key, size_gb = _split(name)
    cards = [card for card in all_gpus() if key in _keys(card) and size_gb in (None, card.vram_gb)]
    if vram_bytes is not None and cards:
        nearest = min(cards, key=lambda card: abs(card.vram_bytes - vram_bytes))
        cards = [card for card in cards if card.vram_gb == nearest.vram_gb]
    if len(cards) == 1:
        return cards[0]
    if cards:
        names = ", ".join(card.name for card in cards)
        raise _refused(name, f"a name that one card alone has; {len(cards)} are called so", f"name one of: {names}")
    raise _refused(name, "a card of EightGig's table", _guess(key))


def gpu_of_vram(gib: float) -> GpuFacts:
    """A card of which only the memory is known: all that has to do with speed is None.

    Args:
        gib: what CUDA reports as the card's memory, in GiB: for a card with 8 GB on the box 7.5 to 7.7 on Linux.

    Raises:
        ConfigError: `gib` is not a positive number.
    """
    if not (math.isfinite(gib) and gib > 0):
        raise ConfigError(
            [Problem("vram_gib", f"{gib:g}", "a number above 0")],
            source="graphics card",
            next_step="give the card's memory in GiB, for example 8",
        )
    return GpuFacts(
        name=f"{gib:g} GiB card",
        aliases=(),
        vram_gb=None,
        vram_bytes=int(gib * GIB),
        vram_basis="as given",
        bandwidth_bytes_per_s=None,
        matrix_flop_per_s=None,
        fp32_flop_per_s=None,
        rate_basis=None,
        pcie_bytes_per_s=None,
        compute_capability=None,
        has_bf16=None,
    )


def _facts(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> GpuFacts:
    cuda_mib, vram_basis = _cuda_mib(row, rows)
    tflop_per_s = row["matrix_tflop_per_s"]
    major, minor = row["compute_capability"]
    return GpuFacts(
        name=row["name"],
        aliases=tuple(row["aliases"]),
        vram_gb=row["vram_gb"],
        vram_bytes=cuda_mib * MIB,
        vram_basis=vram_basis,
        bandwidth_bytes_per_s=row["bandwidth_gb_per_s"] * 1e9,
        matrix_flop_per_s=None if tflop_per_s is None else tflop_per_s * 1e12,
        fp32_flop_per_s=None if row["fp32_tflop_per_s"] is None else row["fp32_tflop_per_s"] * 1e12,
        rate_basis=row["rate_basis"],
        pcie_bytes_per_s=_attained_pcie_bytes_per_s(row["pcie_generation"], row["pcie_lanes"]),
        compute_capability=(major, minor),
        has_bf16=row["bf16_native"],
    )


def _cuda_mib(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> tuple[int, str]:
    """What CUDA reports, in MiB, and its basis: read, or the size on the box less what a card like it lacks."""
    if "cuda_mib" in row:
        return row["cuda_mib"], row["cuda_mib_basis"]
    like = rows[row["cuda_mib_like"]]
    missing_mib = like["vram_gb"] * GIB // MIB - like["cuda_mib"]
    return row["vram_gb"] * GIB // MIB - missing_mib, f"{row['vram_gb']} GiB less what the {like['name']} lacks"


def _attained_pcie_bytes_per_s(generation: int, num_lanes: int) -> float:
    return PCIE_TRANSFERS_PER_S[generation] * PCIE_DATA_SHARE / 8 * num_lanes * PCIE_ATTAINED_SHARE


def _split(name: str) -> tuple[str, int | None]:
    """What is left of a name when all that may vary is taken off, and the size in GB that it gives."""
    text = name.lower()
    size = SIZE.search(text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    key = PREFIX.sub("", re.sub(r"[\W_]+", "", text)).replace("mobile", "laptop").replace("gpu", "")
    return key, int(size[1]) if size else None


def _keys(card: GpuFacts) -> set[str]:
    return {_split(name)[0] for name in (card.name, *card.aliases)}


def _guess(key: str) -> str:
    """The next step after an unknown name: the cards that resemble it most, at most three, or all of them."""
    cards_of: dict[str, list[str]] = {}
    for card in all_gpus():
        for known in _keys(card):
            cards_of.setdefault(known, []).append(card.name)
    near = difflib.get_close_matches(key, sorted(cards_of), n=3, cutoff=0.5)
    names = list(dict.fromkeys(name for known in near for name in cards_of[known]))[:3]
    guess = f"did you mean {' or '.join(names)}?" if names else f"known: {', '.join(card.name for card in all_gpus())};"
    return f"{guess} else give the card's memory alone, in GiB"


def _refused(name: str, allowed: str, next_step: str) -> ConfigError:
    return ConfigError([Problem("gpu", repr(name), allowed)], source="graphics card", next_step=next_step)
