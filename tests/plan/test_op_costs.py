"""Costs of operations beside torch's own FLOP counter, formulas, and bytes counted by hand."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from tests.tiny import build_tiny_llava
from tests.tiny_training import CPU, load_tiny, tiny_config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eightgig.config import ModelConfig
from eightgig.plan.op_costs import ATTENTION, ATTENTION_BACKWARD, MEMORY, PRODUCT, OpCost, op_cost
from eightgig.plan.workload import largest_workload
from eightgig.step.build import build_compute, build_step, checkpoint_as_configured

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = st.integers(1, 70)


class Costs(TorchDispatchMode):
    """The costs of what runs under it, in order, with the operations' names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, OpCost | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen.append((str(func), op_cost(func, args, kwargs or {}, output)))
        return output

    @property
    def costs(self) -> list[OpCost]:
        return [cost for _, cost in self.seen if cost is not None]


def costs_of(call: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[OpCost]:
    """The costs of `call` on fake tensors of `shapes`."""
    with FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with Costs() as costs:
            call(*tensors)
    return costs.costs


def counted_flops(call: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    """What torch's counter says."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        call(*(torch.empty(shape, dtype=BF16) for shape in shapes))
    return int(counter.get_total_flops())


@given(b=SIZES, m=SIZES, n=SIZES, k=SIZES)
def test_products_count_as_torch_counts_them_and_move_each_operand_once(b: int, m: int, n: int, k: int) -> None:
    for call, shapes, moved in (
        (torch.mm, ((m, k), (k, n)), m * k + k * n + m * n),
        (torch.bmm, ((b, m, k), (b, k, n)), b * (m * k + k * n + m * n)),
        (torch.addmm, ((n,), (m, k), (k, n)), n + m * k + k * n + m * n),
        (torch.baddbmm, ((b, m, n), (b, m, k), (b, k, n)), b * (m * k + k * n + 2 * m * n)),
    ):
        (cost,) = costs_of(call, *shapes)
        assert cost.kind == PRODUCT
        assert cost.flops == counted_flops(call, *shapes)
        assert cost.moved_bytes == 2 * moved


@given(m=SIZES, n=SIZES, k=SIZES)
def test_a_product_in_place_reads_what_it_adds_to_unless_it_overwrites_it(m: int, n: int, k: int) -> None:
    for beta, num_sums in ((1, 2), (0, 1)):
        (cost,) = costs_of(functools.partial(torch.Tensor.addmm_, beta=beta), (m, n), (m, k), (k, n))
        assert cost == OpCost(PRODUCT, BF16, 2 * m * n * k, 2 * (m * k + k * n + num_sums * m * n))


@given(batch=st.integers(1, 3), channels=st.integers(1, 5), out=st.integers(1, 5), patch=st.integers(1, 4), side=SIZES)
def test_a_convolution_is_a_product_of_its_patches(batch: int, channels: int, out: int, patch: int, side: int) -> None:
    side = max(side, patch)

    def call(images: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(images, weight, stride=patch)

    shapes = ((batch, channels, side, side), (out, channels, patch, patch))
    (cost,) = costs_of(call, *shapes)
    assert cost.kind == PRODUCT
    assert cost.flops == counted_flops(call, *shapes) == 2 * batch * (side // patch) ** 2 * out * channels * patch**2


def test_a_trained_convolution_costs_twice_its_forward_pass_on_the_way_back() -> None:
    with FakeTensorMode():
        images, weight = torch.empty(2, 3, 20, 20, requires_grad=True), torch.empty(5, 3, 4, 4, requires_grad=True)
        with Costs() as costs:
            torch.nn.functional.conv2d(images, weight, stride=4).sum().backward()
    flops = [cost.flops for cost in costs.costs if cost.kind == PRODUCT]
    assert flops == [2 * 2 * 25 * 5 * 48, 2 * (2 * 2 * 25 * 5 * 48)]


@given(batch=st.integers(1, 3), heads=st.integers(1, 4), length=SIZES, width=st.sampled_from([16, 64]))
def test_attention_counts_as_torch_counts_it(batch: int, heads: int, length: int, width: int) -> None:
    shape = (batch, heads, length, width)

    def call(*tensors: Tensor) -> None:
        query, key, value = (tensor.requires_grad_() for tensor in tensors)
        torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()

    by_kind = {cost.kind: cost for cost in costs_of(call, shape, shape, shape)}
    assert by_kind[ATTENTION].flops == 4 * batch * heads * length**2 * width
    assert by_kind[ATTENTION_BACKWARD].flops == 10 * batch * heads * length**2 * width
    q, k, v, out = (torch.empty(shape, device="meta") for _ in range(4))
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention_backward(
            out, q, k, v, out, out[..., 0], None, None, length, length, 0.0, False, out, out
        )
    assert by_kind[ATTENTION_BACKWARD].flops == counter.get_total_flops()


@given(length=SIZES)
def test_causal_attention_counts_the_pairs_that_see_each_other(length: int) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    (cost,) = costs_of(call, *[(2, 3, length, 16)] * 3)
    pairs = sum(1 for query in range(length) for key in range(length) if key <= query)
    assert cost.flops == 2 * 3 * pairs * 4 * 16


@pytest.mark.parametrize("num_rows", [1, 5, 100])
@pytest.mark.parametrize("nested", [False, True])
def test_a_4bit_product_writes_its_weight_in_16_bits_first_unless_it_has_few_rows(num_rows: int, nested: bool) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(128, 256, dtype=BF16), compress_statistics=nested, quant_type="nf4")
    arguments, scales = (state.absmax, state.blocksize, state.quant_type), {}
    if nested:
        arguments = (state.state2.absmax, state.blocksize, state.quant_type)
        scales = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    inputs = torch.randn(num_rows, 256, dtype=BF16)
    with Costs() as costs:
        torch.ops.bitsandbytes.gemm_4bit.default(inputs, packed.view(-1, 1), state.shape, *arguments, **scales)
    (cost,) = (cost for name, cost in costs.seen if name == "bitsandbytes.gemm_4bit.default")
    assert cost is not None
    num_blocks = 128 * 256 // 64
    scale_bytes = num_blocks + 4 * math.ceil(num_blocks / 256) + 4 * 256 + 4 if nested else 4 * num_blocks
    stored_bytes, weight_bytes, rows_bytes = 128 * 256 // 2 + scale_bytes, 2 * 128 * 256, 2 * num_rows * (128 + 256)
    assert cost.flops == 2 * num_rows * 128 * 256
    if num_rows == 1:
        assert (cost.moved_bytes, cost.prepared_bytes, cost.num_kernels) == (rows_bytes + stored_bytes, 0, 1)
    else:
        assert (cost.moved_bytes, cost.prepared_bytes) == (rows_bytes + weight_bytes, stored_bytes + weight_bytes)
        assert cost.num_kernels == 4


def test_what_launches_nothing_costs_nothing() -> None:
    def call(x: Tensor) -> None:
        x.view(8, 8).t().transpose(0, 1).unsqueeze(0).expand(3, 8, 8).detach()
        x.split(2)
        x[1:3].permute(1, 0)
        x.unbind(0)
        torch.empty_like(x)
        x.new_empty(3)
        x.matmul(torch.empty(16, 2, dtype=BF16))

    assert [cost.kind for cost in costs_of(call, (4, 16))] == [PRODUCT]


@pytest.mark.parametrize(
    ("call", "moved_bytes"),
    [
        (lambda x: x + 1, 2 * 64 * 2),
        (lambda x: x + x, 3 * 64 * 2),
        (lambda x: x.add_(x), 3 * 64 * 2),
        (lambda x: x.mul_(2), 2 * 64 * 2),
        (lambda x: x.zero_(), 64 * 2),
        (lambda x: x.fill_(1), 64 * 2),
        (lambda x: x.float(), 64 * 2 + 64 * 4),
        (lambda x: x.sum(), 64 * 2 + 2),
        (lambda x: torch.cat([x, x]), 4 * 64 * 2),
        (lambda x: torch.zeros(10), 40),
        (lambda x: x[:, :1].expand(4, 16).clone(), 4 * 2 + 64 * 2),
        (lambda x: x.index_select(0, torch.empty(3, dtype=torch.int64)), 3 * 8 + 2 * 3 * 16 * 2),
        (lambda x: torch.nn.functional.embedding(torch.empty(5, dtype=torch.int64), x), 5 * 8 + 2 * 5 * 16 * 2),
        (lambda x: torch._foreach_mul_([x, x], 2.0), 4 * 64 * 2),
        (lambda x: torch._foreach_norm([x, x]), 2 * 64 * 2 + 2 * 2),
    ],
)
def test_memory_bound_operations_read_their_inputs_and_write_their_outputs(
    call: Callable[[Tensor], Any], moved_bytes: int
) -> None:
    (cost,) = costs_of(call, (4, 16))
    assert (cost.kind, cost.flops, cost.moved_bytes) == (MEMORY, 0, moved_bytes)


def test_a_loss_reads_of_its_rows_what_is_asked_for() -> None:
    with FakeTensorMode():
        logits, targets = torch.empty(6, 1000, requires_grad=True), torch.empty(6, dtype=torch.int64)
        with Costs() as costs:
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    moved = {name: cost.moved_bytes for name, cost in costs.seen if cost is not None}
    assert moved["aten._log_softmax.default"] == 2 * 6 * 1000 * 4
    assert moved["aten.nll_loss_forward.default"] == 2 * 6 * 8
    assert moved["aten.nll_loss_backward.default"] == 6 * 1000 * 4 + 2 * 6 * 8
    assert moved["aten._log_softmax_backward_data.default"] == 3 * 6 * 1000 * 4


def test_an_8bit_optimizer_reads_and_writes_its_states() -> None:
    parameter, gradient = torch.zeros(4096), torch.zeros(4096)
    states = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
    scales, codes = [torch.zeros(16) for _ in range(2)], [torch.zeros(256) for _ in range(2)]
    func = torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default
    args = ("adam", gradient, parameter, *states, 0.9, 0.99, 0.0, 0.0, 1e-8, 1, 1e-3, *codes, *scales, 0.0, 1.0)
    cost = op_cost(func, args, {}, None)
    assert cost == OpCost(MEMORY, FP32, 0, 2 * (2 * 4 * 4096 + 2 * 4096 + 2 * 4 * 16 + 2 * 4 * 256))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_steps_products_follow_the_rule_of_parameters_and_tokens(checkpointing: bool, tmp_path: Path) -> None:
    """2 x parameters x tokens for each pass: forward, its repetition, the gradients of inputs and of adapters."""
    rank, folder = 8, build_tiny_llava(tmp_path / "model", image_px=32)
    config = tiny_config({"data": {"max_length": 24}, "hardware": {"gradient_checkpointing": checkpointing}})
    loaded = load_tiny(folder, config, adapters=True)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    step = build_step(config, loaded.spec, loaded.model, build_compute(config, CPU, loaded.precision), num_steps=2)
    batch = largest_workload(config.model_copy(update={"model": ModelConfig(name=str(folder))}), loaded.spec).batch
    with Costs() as costs:
        step([batch], batch.num_target_tokens)
    flops: Counter[str] = Counter()
    for name, cost in costs.seen:
        if cost is not None and cost.kind == PRODUCT:
            flops[name] += cost.flops
    layers = {path: module for path, module in loaded.model.named_modules() if isinstance(module, LoraLayer)}
    frozen = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    into = {path: rank * layer.in_features for path, layer in layers.items()}  # A of each adapter
    out_of = {path: rank * layer.out_features for path, layer in layers.items()}  # B
    num_forward = 1 + checkpointing
    # Nothing below the first layer is trained, so the inputs of its first three products have no gradient.
    without_gradient = [path for path in layers if "layers.0.self_attn" in path and "o_proj" not in path]
    assert len(layers) == 14
    assert len(without_gradient) == 3
    of_inputs = sum(frozen.values()) + sum(into.values()) + sum(out_of.values())
    of_inputs -= sum(frozen[path] + into[path] for path in without_gradient)
    of_adapters = sum(into.values()) + sum(out_of.values())
    repeated_in_vain = sum(out_of[path] for path in layers if "down_proj" in path)  # their output is not needed again
    head = loaded.model.get_output_embeddings().weight.numel()
    num_tokens, num_targets = batch.labels.numel(), batch.num_target_tokens
    assert flops["bitsandbytes.gemm_4bit.default"] == num_forward * 2 * sum(frozen.values()) * num_tokens
    assert flops["aten.mm.default"] == (
        2 * num_tokens * (num_forward * of_adapters - checkpointing * repeated_in_vain + of_inputs + of_adapters)
        + 2 * num_targets * 3 * head
    )
