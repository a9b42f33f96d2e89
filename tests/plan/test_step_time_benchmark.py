"""The script that measures steps on a GPU: its logic, on a tiny model on the CPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from benchmarks import step_time
from benchmarks.step_time import StepRun, kernel_class, kernel_figures, run_all
from tests.tiny import build_tiny_llava

CPU = torch.device("cpu")


def test_runs_share_their_weights_and_a_failure_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = step_time.load

    def counted(run: StepRun, device: torch.device) -> step_time.LoadedModel:
        loads.append(load(run, device))
        return loads[-1]

    monkeypatch.setattr(step_time, "load", counted)
    tiny = str(build_tiny_llava(tmp_path / "model", image_px=32))
    runs = [
        StepRun(tiny, 24, batch_size=2, precision="fp32"),
        StepRun("no such model", 24),
        StepRun(tiny, 24, precision="fp32", checkpointing=False),
        StepRun(tiny, 24, precision="fp32", accumulation=3),
    ]
    with_checkpointing, failed, without, accumulated = run_all(runs, CPU, time.perf_counter() + 100)
    assert "no model is called 'no such model'" in failed["error"]
    assert len(loads) == 2  # before the failed one and after it
    assert not any("forward" in vars(layer) for layer in loads[1].spec.family.decoder_layers(loads[1].model))
    for row in (with_checkpointing, without, accumulated):
        assert "error" not in row
        assert "error" not in row["profile"]
        assert 0 < row["steps"][0]["issue_s"] <= row["steps"][0]["forward_backward_s"] < row["steps"][0]["step_s"]
    assert with_checkpointing["num_tokens"] == 2 * without["num_tokens"]
    products = [row["ops"]["bitsandbytes.gemm_4bit.default"] for row in (with_checkpointing, without, accumulated)]
    assert products == [2 * 14, 14, 3 * 2 * 14]


def test_a_run_for_which_no_time_is_left_says_so() -> None:
    (row,) = run_all([StepRun("llava-1.5-7b", 24)], CPU, time.perf_counter() - 1)
    assert "no time was left" in row["error"]


def test_kernels_are_summed_by_class() -> None:
    kernels = [
        ("nvjet_sm90_tst_192x192_64x4", 2.0),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x32x8", 1.0),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", 0.5),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", 0.25),
        ("void kOptimizerStatic8bit2StateBlockwise<float, 0, 256, 1>", 0.125),
        ("Memcpy DtoD (Device -> Device)", 0.0625),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>", 0.5),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>", 0.25),
    ]
    figures = kernel_figures(iter(kernels))
    assert {name: (row["s"], row["num_kernels"]) for name, row in figures["classes"].items()} == {
        "product": (3.0, 2),
        "dequantise": (0.5, 1),
        "attention": (0.25, 1),
        "optimizer": (0.125, 1),
        "transfer": (0.0625, 1),
        "elementwise": (0.75, 2),
    }
    assert figures["kernels_s"] == sum(seconds for _, seconds in kernels)
    assert figures["longest"][0]["name"].startswith("nvjet")
    assert kernel_class("void cutlass::Kernel2<cutlass_80_tensorop_bf16>") == "product"
