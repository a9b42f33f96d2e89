"""What lies on the host: batches before they are moved, copies of what is saved, paged states of an optimizer."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import optim
from torch import nn

from eightgig.data.batch import MicroBatch
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.host_memory import HostBatch, HostCopies, keep_paged_states_on_host
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import FREED, MemoryTrace

CPU = torch.device("cpu")


def sizes(trace: MemoryTrace) -> list[int]:
    return [size for _, size in trace if size != FREED]


@pytest.mark.parametrize(("dtype", "pixel_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_moving_a_batch_allocates_each_of_its_tensors_until_it_goes(dtype: torch.dtype, pixel_bytes: int) -> None:
    ids, pixels = torch.arange(14).view(2, 7), torch.randn(2, 3, 5, 5)
    batch = HostBatch.of(
        MicroBatch({"input_ids": ids, "pixel_values": pixels}, ids.clone(), 5, 14, 2, sample_ids=("a", "b"))
    )
    trace = MemoryTrace()
    with Recorder(trace, CudaRules((8, 6))):
        moved = batch.to(CPU, dtype)
        pixels_seen = moved.model_inputs["pixel_values"].view(-1)  # a view is no storage of its own
    assert sorted(sizes(trace)) == sorted([2 * 7 * 8, 150 * pixel_bytes, 2 * 7 * 8])
    assert torch.equal(moved.model_inputs["input_ids"], ids)
    assert torch.equal(pixels_seen, pixels.to(dtype).view(-1))
    del moved, pixels_seen
    assert sum(size == FREED for _, size in trace) == 3


@pytest.mark.parametrize(("num_elements", "num_states"), [(99_999, 2), (100_000, 0)])
def test_states_from_100_000_elements_on_are_paged(num_elements: int, num_states: int) -> None:
    parameter = nn.Parameter(torch.zeros(num_elements))
    parameter.grad = torch.ones(num_elements)
    optimizer = optim.PagedAdamW8bit([parameter])
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules((8, 6)))
    keep_paged_states_on_host(optimizer, recorder)
    with recorder:
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    scales = -(-num_elements // 256) * 4
    assert sizes(trace).count(num_elements) == num_states
    assert sizes(trace).count(scales) == 2
    assert len(sizes(trace)) == num_states + 2
    assert optimizer.state[parameter]["state1"].numel() == num_elements


def test_another_optimizer_keeps_all_states_on_the_gpu() -> None:
    parameter = nn.Parameter(torch.zeros(200_000))
    optimizer = optim.AdamW8bit([parameter])
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules((8, 6)))
    keep_paged_states_on_host(optimizer, recorder)
    with recorder:
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    assert sizes(trace).count(200_000) == 2


def test_of_what_is_saved_only_copies_on_the_card_count() -> None:
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules((8, 6)))
    with recorder:
        weight = torch.ones(3, 5)
        with HostCopies(recorder):
            on_host = weight.t().detach().to("cpu", copy=True)
            packed = on_host.contiguous()
            numbers = torch.tensor([1, 2, 3]) + 1
            on_card = weight.t().contiguous()
        doubled = packed * 2  # behind it, the CPU stands for the card again
    assert sizes(trace) == [3 * 5 * 4, 3 * 5 * 4, 3 * 5 * 4]
    assert torch.equal(packed, on_card)
    assert doubled.sum() == 30
    assert numbers.tolist() == [2, 3, 4]
