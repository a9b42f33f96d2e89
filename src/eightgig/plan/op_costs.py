"""What one operation costs a GPU: floating-point operations and bytes moved, read off its shapes.

Operations are those that a TorchDispatchMode sees on fake (or real CPU) tensors. Where a GPU runs other kernels than
the CPU for one of them (bitsandbytes' 4-bit product, attention), the cost is that of the GPU's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes  # noqa: F401 - registers the operations that are named here and in cuda_rules
import torch
from torch import Tensor

from eightgig.plan.cuda_rules import FUSED_GEMM_MAX_ROWS

aten = torch.ops.aten

PRODUCT = "product"
ATTENTION = "attention"
ATTENTION_BACKWARD = "attention backward"
MEMORY = "memory"
TRANSFER = "transfer"
BESIDE = "transfer beside computing"
PREFETCH = "prefetch"

TENSORS_PER_FOREACH_KERNEL = (
    64  # torch's MultiTensorApply.cuh, depth_to_max_tensors: 110 for 1 list, 64 for 2, 48 for 3
)
KERNELS_OF_UNFUSED_4BIT = 4  # the scales' codes, their offset, the weight; then the product
SDPA_BACKWARD_PRODUCTS = 5  # of the scores again, and the gradients of v, p, q and k; 2 are in the forward pass


@dataclass(frozen=True, slots=True)
class OpCost:
    """The cost of one operation; equal ones are counted together.

    Attributes:
        kind: PRODUCT, ATTENTION, ATTENTION_BACKWARD, MEMORY (all that computes little), TRANSFER (host to card or
            back), or one of two on a stream of its own, for which nothing waits that is not slower: BESIDE (what goes
            to the host and comes back) and PREFETCH (what comes from there alone).
        dtype: what it computes in; of memory-bound operations that of the output.
        flops: floating-point operations of products, a multiplication and an addition being two; 0 where memory binds.
        moved_bytes: read and written by the kernel that does the work.
        prepared_bytes: read and written before that by kernels which make its operands (dequantising).
        num_kernels: launched for it.
    """

    kind: str
    dtype: torch.dtype
    flops: int
    moved_bytes: int
    prepared_bytes: int = 0
    num_kernels: int = 1


Rule = Callable[[Sequence[Any], Mapping[str, Any], Any], OpCost | None]


def op_cost(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost | None:
    """The cost of `func(*args, **kwargs)`, which returned `output`; None where no kernel is launched.

    Args:
        func: an overload such as `torch.ops.aten.mm.default`.
        args: its positional arguments, tensors of any kind among them; only shapes, strides and dtypes are read.
        kwargs: its keyword arguments.
        output: a tensor, a sequence of them, a number or None.
    """
    rule = _rule(func)
    return None if rule is None else rule(args, kwargs, output)


@functools.cache
def _rule(func: Any) -> Rule | None:
    """How `func` is counted; None for what launches nothing."""
    if func in _NOTHING:
        return None
    if func in _RULES:
        return _RULES[func]
    schema = func._schema
    is_written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    if not any(is_written):
        if any(returned.alias_info is not None for returned in schema.returns):
            return None  # a view
        if not any("Tensor" in str(returned.type) for returned in schema.returns):
            return None  # a question about shape or place
    names = [argument.name for argument in schema.arguments]
    written = frozenset(place for place, is_one in enumerate(is_written) if is_one and names[place] != "out")
    is_foreach = schema.name.startswith(("aten::_foreach", "aten::_fused"))
    return functools.partial(_memory_bound, written, func in _OVERWRITING, is_foreach)


def _memory_bound(
    written: frozenset[int],
    overwrites: bool,
    is_foreach: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
) -> OpCost | None:
    """Every input read once, every output and every changed input written once."""
    moved_bytes = 0
    changed = []
    for place, value in enumerate(args):
        tensors = _tensors(value)
        if place in written:
            changed += tensors
        if not (overwrites and place in written):
            moved_bytes += sum(map(_bytes, tensors))
    for name, value in kwargs.items():
        if name != "out":
            moved_bytes += sum(map(_bytes, _tensors(value)))
    made = changed if changed else _tensors(output)
    if not made:
        return None
    moved_bytes += sum(map(_bytes, made))
    num_kernels = math.ceil(len(made) / TENSORS_PER_FOREACH_KERNEL) if is_foreach else 1
    first = made[0]
    kind = MEMORY
    if args and isinstance(args[0], Tensor) and args[0].device.type != first.device.type:
        kind = TRANSFER
    return OpCost(kind, first.dtype, 0, moved_bytes, num_kernels=num_kernels)


def _gathered(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Of the source only what is picked is read: as much as is written; beside it the indices."""
    indices = sum(_bytes(tensor) for value in args[1:] for tensor in _tensors(value))
    return OpCost(MEMORY, output.dtype, 0, indices + 2 * _bytes(output))


def _scattered_in_place(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Of the changed tensor only what the values cover is read and written."""
    values = max((_bytes(tensor) for value in args[1:] for tensor in _tensors(value)), default=0)
    indices = sum(_bytes(tensor) for value in args[1:] for tensor in _tensors(value)) - values
    return OpCost(MEMORY, output.dtype, 0, indices + 3 * values)


def _written_only(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """A gradient that is zero but for the part that comes in: everything is zeroed, then the part is copied."""
    return OpCost(MEMORY, output.dtype, 0, _bytes(output) + 2 * _bytes(args[0]), num_kernels=2)


def _loss_of_picked(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Of each row one log-probability is read: as much as there are targets."""
    return OpCost(MEMORY, args[0].dtype, 0, 2 * _bytes(args[1]))


def _gradient_of_picked(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Zeros with one number in each row."""
    return OpCost(MEMORY, output.dtype, 0, _bytes(output) + 2 * _bytes(args[2]), num_kernels=2)


def _product(first: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Products of matrices, or of a batch of them, whose operands are the arguments `first` and the next."""
    left, right = args[first], args[first + 1]
    *batch, m, k = left.shape
    n = right.shape[-1]
    moved_bytes = _bytes(left) + _bytes(right) + _bytes(output)
    if kwargs.get("beta", 1) != 0:
        moved_bytes += sum(_bytes(value) for value in args[:first])  # what is added
    return OpCost(PRODUCT, left.dtype, 2 * math.prod(batch) * m * n * k, moved_bytes)


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """As a product of the patches with the kernels: each weight takes part once for every output position."""
    inputs, weight, is_transposed = args[0], args[1], args[6]
    positions = inputs if is_transposed else output
    num_positions = positions.shape[0] * math.prod(positions.shape[2:])
    moved_bytes = _bytes(inputs) + _bytes(weight) + _bytes(output)
    return OpCost(PRODUCT, inputs.dtype, 2 * num_positions * weight.numel(), moved_bytes)


def _convolution_backward(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """A product of the forward pass's size for each of the gradients (inputs, weight) that is asked for."""
    gradient, inputs, weight, is_transposed = args[0], args[1], args[2], args[7]
    positions = inputs if is_transposed else gradient
    num_positions = positions.shape[0] * math.prod(positions.shape[2:])
    made = [value for value in output[:2] if value is not None]
    moved_bytes = sum(map(_bytes, made)) + len(made) * (_bytes(gradient) + (_bytes(inputs) + _bytes(weight)) // 2)
    flops = 2 * num_positions * weight.numel() * len(made)
    return OpCost(PRODUCT, gradient.dtype, flops, moved_bytes, num_kernels=max(1, len(made)))


def _product_4bit(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Bitsandbytes' product with a 4-bit weight: above a few rows its weight is written in 16 bits first."""
    inputs, packed, (n, k), scales = args[:4]
    m = math.prod(inputs.shape[:-1])
    stored_bytes = _bytes(packed) + _bytes(scales)
    stored_bytes += sum(_bytes(tensor) for value in (*args[6:], *kwargs.values()) for tensor in _tensors(value))
    flops, inputs_bytes = 2 * m * n * k, _bytes(inputs) + _bytes(output)
    if m <= FUSED_GEMM_MAX_ROWS:
        return OpCost(PRODUCT, inputs.dtype, flops, inputs_bytes + stored_bytes)
    weight_bytes = n * k * inputs.element_size()
    return OpCost(
        PRODUCT,
        inputs.dtype,
        flops,
        inputs_bytes + weight_bytes,
        prepared_bytes=stored_bytes + weight_bytes,
        num_kernels=KERNELS_OF_UNFUSED_4BIT,
    )


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Two products over all pairs of positions; a causal kernel skips the half that is masked."""
    query, key, value = args[:3]
    is_causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
    moved_bytes = sum(_bytes(tensor) for tensor in (query, key, value, *_tensors(output)))
    moved_bytes += sum(_bytes(tensor) for tensor in _tensors(kwargs.get("attn_mask")))
    return OpCost(ATTENTION, query.dtype, _attention_flops(query, key, value, is_causal), moved_bytes)


def _attention_backward(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> OpCost:
    """Five products, the scores being computed anew; the gradient of the query is summed up in fp32."""
    gradient, query, key, value = args[:4]
    is_causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
    moved_bytes = sum(_bytes(tensor) for tensor in (gradient, *args[1:6], *_tensors(output)))
    moved_bytes += sum(_bytes(tensor) for tensor in _tensors(kwargs.get("attn_mask")))
    flops = _attention_flops(query, key, value, is_causal) * SDPA_BACKWARD_PRODUCTS // 2
    return OpCost(ATTENTION_BACKWARD, query.dtype, flops, moved_bytes, num_kernels=3)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> int:
    """Products of queries with keys, and of their weights with values: 2 x pairs x width each."""
    *batch, num_queries, width = query.shape
    num_keys = key.shape[-2]
    num_pairs = math.prod(batch) * num_queries * num_keys
    if is_causal:
        num_pairs -= math.prod(batch) * num_queries * (num_queries - 1) // 2
    return 2 * num_pairs * (width + value.shape[-1])


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument or an output."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _bytes(tensor: Tensor) -> int:
    """What reading or writing `tensor` moves: an element that stands for many (an expanded one) once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            count *= size
    return count * tensor.element_size()


def _overloads(*packets: Any) -> Iterator[Any]:
    for packet in packets:
        for name in packet.overloads():
            yield getattr(packet, name)


_NOTHING = frozenset(
    _overloads(
        aten._unsafe_view,
        aten.empty,
        aten.empty_like,
        aten.empty_strided,
        aten.new_empty,
        aten.new_empty_strided,
        aten.lift_fresh,
        aten.record_stream,
    )
)
# What they change they don't read.
_OVERWRITING = frozenset(
    _overloads(aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.random_, aten._foreach_copy_)
)
_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_overloads(aten.mm, aten.bmm), functools.partial(_product, 0)),
    **dict.fromkeys(_overloads(aten.addmm, aten.addmm_, aten.baddbmm), functools.partial(_product, 1)),
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    torch.ops.bitsandbytes.gemm_4bit.default: _product_4bit,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    **dict.fromkeys(_overloads(aten.embedding, aten.index, aten.index_select, aten.gather), _gathered),
    **dict.fromkeys(
        _overloads(aten.index_put_, aten.index_add_, aten.index_copy_, aten.scatter_, aten.scatter_add_),
        _scattered_in_place,
    ),
    aten.nll_loss_forward.default: _loss_of_picked,
    aten.nll_loss_backward.default: _gradient_of_picked,
    **dict.fromkeys(_overloads(aten.slice_backward, aten.select_backward), _written_only),
}
