"""Optimizer steps of full-size models with random weights on one GPU: how long they take, and in which kernels.

usage: python -m benchmarks.step_time --out RECORD.json [--only MODEL ...] [--budget-s 230] [--no-kernels]

One process, alone on the GPU. Each run makes the trainer's own step over the planner's largest micro-batch: 2 steps to
warm up (the second with its operations counted), 2 to 4 timed, one under the profiler. Runs of one model share its
weights. A run that fails, or for which no time is left, stands in the record with its error, and the script ends badly.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from benchmarks.kernel_times import all_kernels
from benchmarks.record import write_record
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.units import GIB
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.plan.card_rates import measure_rates, rates_as_json
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, resolve
from eightgig.step.build import build_compute, build_step, checkpoint_as_configured

NUM_TIMED = 4
ENOUGH_S = 2.5  # of timed steps, when there are at least two
NUM_LISTED = 60  # kernels and operations, the longest ones

ANNOTATION = "Optimizer."  # what torch's optimizers name their own step: a span of kernels, not one

# Parts of kernels' names, in the order in which they are asked for.
KERNEL_CLASSES: Mapping[str, tuple[str, ...]] = {
    "attention": ("flash", "fmha", "attention", "mem_eff"),
    "dequantise": ("dequantize",),
    "optimizer": ("optimizer", "adam"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "gemv", "sm90_", "sm80_", "conv", "cudnn"),
    "transfer": ("memcpy", "memset"),
}


@dataclass(frozen=True)
class StepRun:
    """One run. `max_length` counts text tokens; the image's come on top."""

    model: str
    max_length: int
    batch_size: int = 1
    checkpointing: bool = True
    accumulation: int = 1
    method: str = "qlora"
    precision: str = "bf16"
    rank: int = 16
    image_px: int | None = None
    detailed: bool = False

    def config(self, device: str) -> TrainingConfig:
        """The settings of the run."""
        return TrainingConfig.model_validate(
            {
                "model": {"name": self.model, "random_weights_seed": 0},
                "data": {"max_length": self.max_length, "image_size": self.image_px},
                "training": {
                    "method": self.method,
                    "batch_size": self.batch_size,
                    "gradient_accumulation_steps": self.accumulation,
                    "optimizer": "adamw_8bit" if device == "cuda" else "adamw",
                    "lora": {"rank": self.rank, "alpha": 2 * self.rank},
                    "quantization": {"load_in_4bit": self.method == "qlora"},
                },
                "hardware": {
                    "device": device,
                    "mixed_precision": self.precision,
                    "gradient_checkpointing": self.checkpointing,
                },
            }
        )

    def weights(self) -> tuple[str, str, str, int, int | None]:
        """What runs with the same weights have in common."""
        return self.model, self.method, self.precision, self.rank, self.image_px


RUNS = (
    StepRun("llava-1.5-7b", 512),
    StepRun("llava-1.5-7b", 512, batch_size=4, detailed=True),
    StepRun("llava-1.5-7b", 1472, batch_size=4),
    StepRun("llava-1.5-7b", 512, batch_size=8, checkpointing=False),
    StepRun("llava-1.5-7b", 512, checkpointing=False),
    StepRun("llava-1.5-7b", 3520, batch_size=2),
    StepRun("llava-1.5-7b", 24),
    StepRun("llava-1.5-7b", 512, accumulation=2),
    StepRun("qwen2.5-vl-7b", 1024, batch_size=4, image_px=672, detailed=True),
    StepRun("qwen2.5-vl-7b", 1024, image_px=672),
    StepRun("qwen2.5-vl-7b", 1472, batch_size=4, checkpointing=False, image_px=672),
    StepRun("qwen3-vl-2b", 2048, batch_size=8, image_px=672),
    StepRun("qwen3-vl-2b", 512, checkpointing=False, image_px=672),
    StepRun("llava-1.5-7b", 512, batch_size=8, method="lora"),
    StepRun("llava-1.5-7b", 512, method="lora", checkpointing=False),
    StepRun("llava-1.5-7b", 512, batch_size=4, precision="fp16"),
)


class OpCounter(TorchDispatchMode):
    """Counts the operations that run under it by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def load(run: StepRun, device: torch.device) -> LoadedModel:
    """The model of `run` with its adapters, as the trainer loads it."""
    config = run.config(device.type)
    loaded = load_model(config, resolve(run.model), device, choose_precision(MixedPrecision(run.precision), device))
    attach_adapters(loaded, config)
    return loaded


def measure(run: StepRun, loaded: LoadedModel, device: torch.device) -> dict[str, Any]:
    """The row of `run` on `loaded`, which is left as it was."""
    config, spec = run.config(device.type), loaded.spec
    checkpoint_as_configured(config, spec, loaded.model)
    try:
        return _measure(run, config, spec, loaded, device)
    finally:
        if run.checkpointing:
            for layer in spec.family.decoder_layers(loaded.model):
                del layer.forward  # the wrapper; the class's own is back
        loaded.model.zero_grad(set_to_none=True)


def _measure(
    run: StepRun, config: TrainingConfig, spec: ModelSpec, loaded: LoadedModel, device: torch.device
) -> dict[str, Any]:
    work = largest_workload(config, spec)
    batch = work.batch.pin_memory() if device.type == "cuda" else work.batch
    compute = build_compute(config, device, loaded.precision)
    step = build_step(config, spec, loaded.model, compute, num_steps=100)
    micro_batches = [batch] * run.accumulation
    num_targets = batch.num_target_tokens * run.accumulation

    def once() -> dict[str, float]:
        synchronize(device)
        started = time.perf_counter()
        step(micro_batches, num_targets)
        issued = time.perf_counter()
        synchronize(device)
        computed = time.perf_counter()
        norm = step.finish_gradients()
        step.apply(norm)
        updated = time.perf_counter()
        synchronize(device)
        done = time.perf_counter()
        return {
            "step_s": done - started,
            "issue_s": issued - started,
            "forward_backward_s": computed - started,
            "update_issue_s": updated - computed,
            "update_s": done - computed,
        }

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once()
    counter = OpCounter()
    with counter:
        once()
    timed = [once()]
    while len(timed) < NUM_TIMED and (len(timed) < 2 or sum(row["step_s"] for row in timed) < ENOUGH_S):
        timed.append(once())
    row = {
        "num_tokens": batch.num_tokens,
        "num_padded_tokens": batch.labels.numel(),
        "num_target_tokens": batch.num_target_tokens,
        "steps": timed,
        "step_s": median(row["step_s"] for row in timed),
        "ops": dict(counter.counts.most_common()),
    }
    if device.type == "cuda":
        row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return row | {"profile": profiled(once, device, run.detailed)}


def profiled(call: Callable[[], Any], device: torch.device, detailed: bool) -> dict[str, Any]:
    """Kernels of `call` by class and by name; of a detailed one also operations with their shapes."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    if detailed and on_gpu:
        activities.append(ProfilerActivity.CPU)
    try:
        with profile(activities=activities, record_shapes=detailed) as profiler:
            call()
            synchronize(device)
        wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [
            event
            for event in profiler.profiler.kineto_results.events()
            if event.device_type() == wanted and not event.name().startswith(ANNOTATION)
        ]
        figures = kernel_figures((event.name(), event.duration_ns() / 1e9) for event in events)
        return figures | ({"ops": _op_rows(profiler)} if detailed else {})
    except Exception:  # noqa: BLE001 - the times, which stand without it, must not be lost
        return {"error": traceback.format_exc()}


def kernel_figures(kernels: Iterator[tuple[str, float]]) -> dict[str, Any]:
    """Sums over (name, seconds) of kernels: by class, and of the longest by name."""
    seconds, counts = Counter[str](), Counter[str]()
    for name, duration_s in kernels:
        seconds[name] += duration_s
        counts[name] += 1
    classes: dict[str, dict[str, float]] = {}
    for name, total_s in seconds.items():
        row = classes.setdefault(kernel_class(name), {"s": 0.0, "num_kernels": 0})
        row["s"] += total_s
        row["num_kernels"] += counts[name]
    return {
        "kernels_s": sum(seconds.values()),
        "num_kernels": sum(counts.values()),
        "classes": classes,
        "longest": [
            {"name": name[:160], "s": s, "num_kernels": counts[name]} for name, s in seconds.most_common(NUM_LISTED)
        ],
    }


def kernel_class(name: str) -> str:
    """The class of the kernel `name`."""
    lower = name.lower()
    return next((kind for kind, parts in KERNEL_CLASSES.items() if any(part in lower for part in parts)), "elementwise")


def _op_rows(profiler: profile) -> list[dict[str, Any]]:
    rows = [
        {"op": row.key, "shapes": str(row.input_shapes), "count": row.count, "s": row.self_device_time_total / 1e6}
        for row in profiler.key_averages(group_by_input_shape=True)
        if row.self_device_time_total > 0 and row.device_type == DeviceType.CPU
    ]
    return sorted(rows, key=lambda row: -row["s"])[: 4 * NUM_LISTED]


def median(values: Iterator[float]) -> float:
    """The median; the mean of the middle two where their number is even."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_all(runs: Sequence[StepRun], device: torch.device, ends_at: float) -> list[dict[str, Any]]:
    """A row for each of `runs`; those with the same weights in a row share them."""
    rows = []
    for _, members in groupby(runs, StepRun.weights):
        loaded: LoadedModel | None = None
        loading_s = 0.0
        for run in members:
            row: dict[str, Any] = asdict(run)
            started = time.perf_counter()
            try:
                if started > ends_at:
                    raise TimeoutError("no time was left for it")
                if loaded is None:
                    loaded = load(run, device)
                    synchronize(device)
                    loading_s = time.perf_counter() - started
                row |= {"loading_s": loading_s} | measure(run, loaded, device)
            except Exception:  # noqa: BLE001 - one run must not lose the others
                row["error"] = traceback.format_exc()
            row["measuring_s"] = time.perf_counter() - started
            rows.append(row)
            print(run, f"{row['step_s']:.3f} s" if "step_s" in row else row.get("error", "")[-400:], flush=True)
            _collect(device)
        loaded = None
        _collect(device)
    return rows


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Measure kernels and runs, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--budget-s", type=float, default=230.0)
    parser.add_argument("--no-kernels", action="store_true")
    arguments = parser.parse_args()
    ends_at = time.perf_counter() + arguments.budget_s
    figures: dict[str, Any] = {}
    if not arguments.no_kernels:
        try:
            figures["kernels"] = all_kernels()
            started = time.perf_counter()
            rates = rates_as_json(measure_rates(torch.device("cuda")))
            figures["rates"] = rates | {"measuring_s": time.perf_counter() - started}
        except Exception:  # noqa: BLE001 - the runs are still wanted
            figures["kernels"] = {"error": traceback.format_exc()}
            print(figures["kernels"]["error"], flush=True)
    runs = [run for run in RUNS if not arguments.only or run.model in arguments.only]
    figures["runs"] = run_all(runs, torch.device("cuda"), ends_at)
    conditions = {
        "weights": "random, full size; NF4 with double quantisation where the method is qlora",
        "num_warm_up": 2,
        "micro_batch": "eightgig.plan.workload.largest_workload, in pinned memory",
        "optimizer": "adamw_8bit",
    }
    write_record(arguments.out, name="step_time", figures=figures, conditions=conditions)
    failed = [row["model"] for row in figures["runs"] if "error" in row or "error" in row["profile"]]
    if failed or "error" in figures.get("kernels", {}):
        raise SystemExit(f"failed: {len(failed)} runs ({', '.join(failed)})")


if __name__ == "__main__":
    main()
