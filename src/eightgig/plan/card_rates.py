"""How fast a card is at what training does: measured on the card at hand, or estimated from its data sheet.

What a card attains of its data sheet was measured on an H100: `attained_rates.json`, which
`benchmarks/attained_rates.py` makes from the record that it names. Other cards attain more or less of theirs; in public
measurements of 16-bit products an RTX 5060 Ti 99 % and an L4 72 %, where our H100 has 79 %.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eightgig.core.units import MIB
from eightgig.registry.gpus import GpuFacts, get_gpu

MEASURED = "measured on this card"
ESTIMATED = "estimated from the card's data sheet"

# What is timed. Sizes are those of a 7B model's layers, so large that no card's cache holds them.
PRODUCTS = ((2048, 4096, 4096), (4096, 4096, 4096), (2048, 11008, 4096), (4096, 11008, 4096))  # rows, outputs, inputs
FP32_PRODUCT = (4096, 4096, 4096)
ATTENTION_SHAPE = (4, 32, 1088, 128)  # samples, heads, tokens, width; causal
NUM_ELEMENTS = 1 << 24
ROW = 4096
COPIED_BYTES = 64 * MIB
# The kernels that most bytes of a step go through, and the bytes that each moves for an element.
ELEMENTWISE: dict[str, tuple[int, torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
    "add bf16": (6, torch.bfloat16, lambda a, b: a + b),
    "mul scalar bf16": (4, torch.bfloat16, lambda a, b: a * 2.0),
    "silu bf16": (4, torch.bfloat16, lambda a, b: functional.silu(a)),
    "to fp32": (6, torch.bfloat16, lambda a, b: a.float()),
    "add fp32": (12, torch.float32, lambda a, b: a + b),
    "pow fp32": (8, torch.float32, lambda a, b: a.pow(2)),
    "mean fp32": (4, torch.float32, lambda a, b: a.view(-1, ROW).mean(-1)),
    "softmax fp32": (8, torch.float32, lambda a, b: a.view(-1, ROW).softmax(-1)),
}

PAUSE_CYCLES = 10_000_000  # 3 to 8 ms at the clocks of today's cards: longer than launching what is timed
NUM_CALLS = 12
NUM_SETS = 2  # of operands, taken in turns: weights of a model come from memory, not from the cache
NUM_TINY = 500  # fewer than a card's queue of launches holds, so that the CPU never waits


@dataclass(frozen=True)
class CardRates:
    """What a card attains.

    Attributes:
        product_flop_per_s: products of 16-bit matrices.
        fp32_product_flop_per_s: products of fp32 matrices.
        attention_flop_per_s, attention_backward_flop_per_s: of 16-bit scaled dot-product attention.
        bytes_per_s: read and written by the mean kernel that is bound by memory.
        transfer_bytes_per_s: from pinned memory to the card.
        kernel_s: what a kernel takes in a row of others when it does next to nothing.
        issue_s: what the CPU takes to issue one in-place addition.
        dispatch_s: what the CPU takes in a training step for each operation that launches kernels; the Python code of
            modules, adapters and autograd is part of it.
        basis: MEASURED or ESTIMATED.
    """

    product_flop_per_s: float
    fp32_product_flop_per_s: float
    attention_flop_per_s: float
    attention_backward_flop_per_s: float
    bytes_per_s: float
    transfer_bytes_per_s: float
    kernel_s: float
    issue_s: float
    dispatch_s: float
    basis: str


@functools.cache
def attained() -> tuple[CardRates, GpuFacts]:
    """What was measured once and for all, and the card that it was measured on."""
    record = json.loads((files("eightgig.plan") / "attained_rates.json").read_text(encoding="utf-8"))
    return CardRates(**record["rates"], basis=MEASURED), get_gpu(record["card"])


def rates_of(gpu: GpuFacts) -> CardRates | None:
    """The rates of a card that is not at hand; None where its data sheet is not known.

    The shares of the data sheet, and the times of the CPU and of a launch, are those of the machine of `attained`.
    """
    matrix, fp32, bandwidth = gpu.matrix_flop_per_s, gpu.fp32_flop_per_s, gpu.bandwidth_bytes_per_s
    if matrix is None or fp32 is None or bandwidth is None or gpu.pcie_bytes_per_s is None:
        return None
    known, card = attained()
    assert card.matrix_flop_per_s is not None
    assert card.fp32_flop_per_s is not None
    assert card.bandwidth_bytes_per_s is not None
    by_matrix, by_fp32 = matrix / card.matrix_flop_per_s, fp32 / card.fp32_flop_per_s
    return replace(
        known,
        product_flop_per_s=known.product_flop_per_s * by_matrix,
        fp32_product_flop_per_s=known.fp32_product_flop_per_s * by_fp32,
        attention_flop_per_s=known.attention_flop_per_s * by_matrix,
        attention_backward_flop_per_s=known.attention_backward_flop_per_s * by_matrix,
        bytes_per_s=known.bytes_per_s * bandwidth / card.bandwidth_bytes_per_s,
        transfer_bytes_per_s=gpu.pcie_bytes_per_s,
        basis=ESTIMATED,
    )


def measure_rates(device: torch.device) -> CardRates:
    """The rates of the CUDA card `device`, measured in a few seconds. Takes about 1 GiB of its memory for that time.

    The CPU's time for an operation of a training step is taken from that for an addition, in the proportion that
    `attained` has.
    """
    with torch.cuda.device(device):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        kernel_s, issue_s = _launch_seconds(device)
        forward_s, backward_s = _attention_seconds(device, dtype)
        known, _ = attained()
        rates = CardRates(
            product_flop_per_s=_total([_product(size, device, dtype) for size in PRODUCTS]),
            fp32_product_flop_per_s=_total([_product(FP32_PRODUCT, device, torch.float32)]),
            attention_flop_per_s=attention_flops() / forward_s,
            attention_backward_flop_per_s=attention_flops() * 5 / 2 / backward_s,
            bytes_per_s=_total([_elementwise(name, device, dtype) for name in ELEMENTWISE]),
            transfer_bytes_per_s=COPIED_BYTES / _copy_seconds(device),
            kernel_s=kernel_s,
            issue_s=issue_s,
            dispatch_s=known.dispatch_s * issue_s / known.issue_s,
            basis=MEASURED,
        )
        torch.cuda.empty_cache()
    return rates


def attention_flops() -> int:
    """Of one forward pass of attention as it is timed: two products over the pairs that see each other."""
    samples, heads, tokens, width = ATTENTION_SHAPE
    return 4 * samples * heads * width * tokens * (tokens + 1) // 2


def rates_as_json(rates: CardRates) -> dict[str, Any]:
    """The rates as `attained_rates.json` holds them."""
    return {name: value for name, value in asdict(rates).items() if name != "basis"}


def gpu_seconds(calls: Sequence[Callable[[], Any]], num_calls: int = NUM_CALLS) -> float:
    """The card's time for one of `calls`, which are made in turns, behind a pause that hides their launches."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(PAUSE_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    for call in itertools.islice(itertools.cycle(calls), num_calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / num_calls


def _total(parts: Sequence[tuple[int, float]]) -> float:
    """The rate over all of (amount, seconds)."""
    return sum(amount for amount, _ in parts) / sum(seconds for _, seconds in parts)


def _product(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """FLOP and seconds of a linear layer's product."""
    m, n, k = size
    sets = [[torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (n, k))] for _ in range(NUM_SETS)]
    return 2 * m * n * k, gpu_seconds([functools.partial(functional.linear, x, weight) for x, weight in sets])


def _elementwise(name: str, device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """Bytes and seconds of the kernel `name`; 16-bit ones compute in `dtype`."""
    num_bytes, own_dtype, kernel = ELEMENTWISE[name]
    dtype = torch.float32 if own_dtype is torch.float32 else dtype
    sets = [[torch.randn(NUM_ELEMENTS, device=device, dtype=dtype) for _ in range(2)] for _ in range(NUM_SETS)]
    return num_bytes * NUM_ELEMENTS, gpu_seconds([functools.partial(kernel, a, b) for a, b in sets])


def _attention_seconds(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    query, key, value = (torch.randn(ATTENTION_SHAPE, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    forward = functools.partial(functional.scaled_dot_product_attention, query, key, value, is_causal=True)
    output = forward()
    gradient = torch.randn_like(output)
    backward = functools.partial(torch.autograd.grad, output, (query, key, value), gradient, retain_graph=True)
    return gpu_seconds([forward]), gpu_seconds([backward])


def _launch_seconds(device: torch.device) -> tuple[float, float]:
    """What a kernel that does nothing takes on the card, and on the CPU to issue."""
    tiny = torch.ones(16, device=device)
    kernel_s = gpu_seconds([functools.partial(tiny.add_, 1.0)], num_calls=NUM_TINY // 2)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_TINY):
        tiny.add_(1.0)
    issue_s = (time.perf_counter() - started) / NUM_TINY
    torch.cuda.synchronize()
    return kernel_s, issue_s


def _copy_seconds(device: torch.device) -> float:
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    return gpu_seconds([functools.partial(source.to, device, non_blocking=True)])
