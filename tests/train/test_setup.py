"""Where a run computes, and in which number format each method keeps its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.errors import ConfigError, EnvironmentProblem
from eightgig.models.precision import DTYPES, Precision
from eightgig.step.build import build_compute
from eightgig.train import setup
from eightgig.train.setup import Place, choose_place

QLORA: dict[str, Any] = {}
LORA = {"quantization": {"load_in_4bit": False}}
FULL = {"quantization": {"load_in_4bit": False}, "lora": None}


def _config(training: dict[str, Any] | None = None, **hardware: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"training": training or {}, "hardware": {"device": "cpu"} | hardware})


def test_a_cpu_is_chosen_where_it_is_asked_for_or_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_place(_config()).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_place(_config(device="auto")).device.type == "cpu"
    with pytest.raises(EnvironmentProblem, match="PyTorch sees no CUDA device"):
        choose_place(_config(device="cuda"))


def test_a_cap_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"hardware\.cap_gib = 4"):
        choose_place(_config(device="auto", cap_gib=4.0))


@pytest.mark.parametrize(("num_processes", "accumulation", "fits"), [(2, 4, True), (4, 4, True), (3, 4, False)])
def test_micro_batches_must_be_shared_evenly(
    num_processes: int, accumulation: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: num_processes))
    config = _config({"gradient_accumulation_steps": accumulation})
    if fits:
        assert choose_place(config).accelerator.num_processes == num_processes
    else:
        with pytest.raises(ConfigError, match=f"a multiple of the {num_processes} processes"):
            choose_place(config)


def test_processes_share_passes_that_several_micro_batches_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, eight micro-batches, four of them a pass: a pass each. Eight a pass would leave one with none."""
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    configs = [_config({"gradient_accumulation_steps": 8}, micro_batches_per_pass=count) for count in (4, 8, "auto")]
    assert choose_place(configs[0]).accelerator.num_processes == 2
    with pytest.raises(ConfigError, match=r"the 2 processes, .* times hardware\.micro_batches_per_pass = 8"):
        choose_place(configs[1])
    left_to_the_plan = [setup._for_processes(configs[2], count).hardware.micro_batches_per_pass for count in (1, 2)]
    assert left_to_the_plan == ["auto", 1]
    assert setup._for_processes(configs[0], 2) == configs[0]


@pytest.mark.parametrize(
    ("training", "device", "precision", "weights", "autocast"),
    [
        (QLORA, "cpu", "fp32", torch.float32, None),
        (QLORA, "cuda", "bf16", torch.bfloat16, None),
        (QLORA, "cuda", "fp16", torch.float16, None),
        (LORA, "cpu", "bf16", torch.bfloat16, None),
        # Full fine-tuning: a gradient scaler needs fp32 weights, and so does a CPU; bf16 on a GPU trains as it is.
        (FULL, "cuda", "fp16", torch.float32, torch.float16),
        (FULL, "cpu", "bf16", torch.float32, torch.bfloat16),
        (FULL, "cuda", "bf16", torch.bfloat16, None),
        (FULL, "cpu", "fp32", torch.float32, None),
    ],
)
def test_autocast_only_where_weights_are_wider_than_the_computation(
    training: dict[str, Any],
    device: str,
    precision: str,
    weights: torch.dtype,
    autocast: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Place, "device", torch.device(device))
    word = MixedPrecision(precision)
    place = Place(Accelerator(cpu=True), Precision(DTYPES[word], word, None))
    compute = build_compute(_config({**training, "loss_chunk_tokens": 77}), place.device, place.precision)
    assert (compute.input_dtype, compute.autocast_dtype) == (weights, autocast)
    assert (compute.device.type, compute.loss_chunk_tokens) == (device, 77)
