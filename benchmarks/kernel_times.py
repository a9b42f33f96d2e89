"""How long single CUDA kernels take on the GPU at hand: what `eightgig.plan.card_rates` is derived from.

Each kernel is queued behind a pause of the GPU, so that its time is the GPU's own and not that of launching it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor

from eightgig.plan.card_rates import gpu_seconds

CUDA = torch.device("cuda")
NUM_SETS = 3  # of operands, taken in turns: weights of a model come from memory, not from the cache

TOKENS = (64, 256, 600, 1088, 2048, 4096, 8192)
WEIGHTS = ((4096, 4096), (11008, 4096), (4096, 11008), (3584, 512), (18944, 3584), (2048, 6144), (32064, 4096))
RANKS = (8, 16, 64)
ADAPTED = ((4096, 4096), (4096, 11008))  # inputs and outputs of a layer with an adapter


def _product_call(shape_a: tuple[int, int], shape_b: tuple[int, int], dtype: torch.dtype, layout: str) -> Any:
    """A product of operands in memory as `layout` says: n as they are, t transposed."""
    a, b = (torch.randn(shape, device=CUDA, dtype=dtype) for shape in (shape_a, shape_b))
    left = a.t() if layout[0] == "t" else a
    right = b.t() if layout[1] == "t" else b
    return lambda: torch.mm(left, right)


def _product(m: int, n: int, k: int, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    shape_a = (k, m) if layout[0] == "t" else (m, k)
    shape_b = (n, k) if layout[1] == "t" else (k, n)
    calls = [_product_call(shape_a, shape_b, dtype, layout) for _ in range(NUM_SETS)]
    return {"m": m, "n": n, "k": k, "dtype": str(dtype), "layout": layout, "s": gpu_seconds(calls)}


def products() -> Iterator[dict[str, Any]]:
    """Products of a frozen layer (its output, its input's gradient) and of an adapter in fp32, as training has them."""
    for dtype in (torch.bfloat16, torch.float16):
        yield _product(8192, 8192, 8192, dtype, "nn")
        for m, (n, k) in itertools.product(TOKENS, WEIGHTS):
            yield _product(m, n, k, dtype, "nt")
            if dtype is torch.bfloat16:
                yield _product(m, k, n, dtype, "nn")
    yield _product(4096, 4096, 4096, torch.float32, "nn")
    for m, (k, n), rank in itertools.product(TOKENS[1:], ADAPTED, RANKS):
        dtype = torch.float32
        yield _product(m, rank, k, dtype, "nt")  # x A'
        yield _product(m, n, rank, dtype, "nt")  # h B'
        yield _product(n, rank, m, dtype, "tn")  # gradient of B
        yield _product(m, rank, n, dtype, "nn")  # gradient of h
        yield _product(rank, k, m, dtype, "tn")  # gradient of A
        yield _product(m, k, rank, dtype, "nn")  # gradient of x


def quantised() -> Iterator[dict[str, Any]]:
    """Dequantising a 4-bit weight, and bitsandbytes' product with one, nested scales included."""
    for rows, columns in WEIGHTS[:5]:
        weight = torch.randn(rows, columns, device=CUDA, dtype=torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        row = {"rows": rows, "columns": columns}

        def dequantise(packed: Any = packed, state: Any = state) -> Tensor:
            return functional.dequantize_4bit(packed, state)

        yield row | {"op": "dequantize_4bit", "m": 0, "s": gpu_seconds([dequantise])}
        for m in (1, 64, 256, 600, 1088, 2048, 4096):
            x = torch.randn(m, columns, device=CUDA, dtype=torch.bfloat16)

            def multiply(x: Tensor = x, packed: Any = packed, state: Any = state) -> Tensor:
                return torch.ops.bitsandbytes.gemm_4bit.default(
                    x,
                    packed.view(-1, 1),
                    state.shape,
                    state.state2.absmax,
                    state.blocksize,
                    state.quant_type,
                    absmax_8bit=state.absmax,
                    absmax_code=state.state2.code,
                    absmax_offset=state.offset,
                )

            yield row | {"op": "gemm_4bit", "m": m, "s": gpu_seconds([multiply])}


def memory_bound() -> Iterator[dict[str, Any]]:
    """Elementwise kernels, reductions and copies by the bytes that they read and write."""
    for power in (8, 12, 16, 18, 20, 21, 22, 23, 24, 26, 28):
        size = 1 << power
        sets = [[torch.randn(size, device=CUDA, dtype=torch.bfloat16) for _ in range(2)] for _ in range(NUM_SETS)]
        wide = [[values.float() for values in pair] for pair in sets] if power < 28 else []
        yield _bytes("add bf16", 6 * size, [lambda p=p: p[0] + p[1] for p in sets])
        yield _bytes("mul scalar bf16", 4 * size, [lambda p=p: p[0] * 2.0 for p in sets])
        yield _bytes("silu bf16", 4 * size, [lambda p=p: torch.nn.functional.silu(p[0]) for p in sets])
        yield _bytes("to fp32", 6 * size, [lambda p=p: p[0].float() for p in sets])
        if power >= 12:
            rows = [p[0].view(-1, 4096) for p in sets]
            yield _bytes("transpose bf16", 4 * size, [lambda r=r: r.t().contiguous() for r in rows])
        for pairs in [wide] if wide else []:
            yield _bytes("add fp32", 12 * size, [lambda p=p: p[0] + p[1] for p in pairs])
            yield _bytes("pow fp32", 8 * size, [lambda p=p: p[0].pow(2) for p in pairs])
            if power >= 12:
                yield _bytes("mean fp32", 4 * size, [lambda p=p: p[0].view(-1, 4096).mean(-1) for p in pairs])
                yield _bytes("softmax fp32", 8 * size, [lambda p=p: p[0].view(-1, 4096).softmax(-1) for p in pairs])
                yield _bytes("sum fp32", 4 * size, [lambda p=p: p[0].sum() for p in pairs])


def _bytes(op: str, moved_bytes: int, calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
    return {"op": op, "moved_bytes": moved_bytes, "s": gpu_seconds(calls)}


def attention() -> Iterator[dict[str, Any]]:
    """Scaled dot-product attention as the decoders and the towers call it."""
    for batch, heads, length, width, causal in (
        (1, 32, 600, 128, True),
        (1, 32, 1088, 128, True),
        (4, 32, 1088, 128, True),
        (1, 32, 2048, 128, True),
        (1, 32, 4096, 128, True),
        (4, 32, 4096, 128, True),
        (1, 28, 4096, 128, True),
        (4, 16, 577, 64, False),
    ):
        shape = (batch, heads, length, width)
        query, key, value = (
            torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        mask = torch.ones(batch, 1, length, length, device=CUDA, dtype=torch.bool).tril()
        for is_masked in (False, True) if causal else (False,):
            arguments = {"attn_mask": mask} if is_masked else {"is_causal": causal}

            def forward(q: Any = query, k: Any = key, v: Any = value, a: Any = arguments) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **a)

            output = forward()
            gradient = torch.randn_like(output)

            def backward(o: Tensor = output, g: Tensor = gradient, i: Any = (query, key, value)) -> Any:
                return torch.autograd.grad(o, i, g, retain_graph=True)

            row = {"batch": batch, "heads": heads, "length": length, "width": width, "causal": causal}
            row |= {"mask": is_masked, "backward_kernel": output.grad_fn.name()}
            yield row | {"forward_s": gpu_seconds([forward]), "backward_s": gpu_seconds([backward])}


def launches() -> dict[str, float]:
    """What a kernel costs whatever it does: on the GPU in a row of others, and on the CPU to issue."""
    tiny = torch.ones(16, device=CUDA)
    gpu_s = gpu_seconds([lambda: tiny.add_(1.0)], num_calls=300)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(500):  # fewer than the launch queue holds, so that the CPU never waits
        tiny.add_(1.0)
    issue_s = (time.perf_counter() - started) / 500
    torch.cuda.synchronize()
    return {"kernel_s": gpu_s, "issue_s": issue_s}


def host_copies() -> Iterator[dict[str, Any]]:
    """Copies to the GPU from pinned and from pageable memory."""
    for is_pinned, size_bytes in itertools.product((True, False), (1 << 20, 1 << 26)):
        source = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        call = [lambda source=source: source.to(CUDA, non_blocking=True)]
        yield {"pinned": is_pinned, "bytes": size_bytes, "s": gpu_seconds(call, num_calls=4)}


def all_kernels() -> dict[str, Any]:
    """Every table."""
    started = time.perf_counter()
    tables: dict[str, Any] = {
        "launches": launches(),
        "products": list(products()),
        "quantised": list(quantised()),
        "memory_bound": list(memory_bound()),
        "attention": list(attention()),
        "host_copies": list(host_copies()),
    }
    torch.cuda.empty_cache()
    return tables | {"measuring_s": time.perf_counter() - started}
