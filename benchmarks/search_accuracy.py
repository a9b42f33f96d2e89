"""Whether the settings that the planner's search chooses are the fastest that fit.

usage: python -m benchmarks.search_accuracy plan --out PLANS.json                       (no GPU)
       python -m benchmarks.search_accuracy measure --plans PLANS.json --out RECORD.json

The grid: all, some or no decoder layers checkpointed, 1 to 8 samples at once of the 8 in a step; each runs under each
budget as the allocator's cap, and so do the settings that were chosen. The longest texts are measured by
`benchmarks.longest_texts`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import write_record

from eightgig import registry
from eightgig.config import ConfigPresets, TrainingConfig
from eightgig.core.units import GIB
from eightgig.models.adapters import attach_adapters
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.plan.candidates import with_changes
from eightgig.plan.card_rates import attained
from eightgig.plan.search import search
from eightgig.plan.workload import largest_workload
from eightgig.registry.gpus import GpuFacts, get_gpu
from eightgig.step.build import build_compute, build_step, checkpoint_as_configured

CARD = "H100 SXM"
NUM_SAMPLES = 8
NUM_TIMED = 2
NUM_TURNS = 3
NEAR = 1.15  # times the fastest
FAR_ABOVE = 1.5  # times the fastest: no second timing would make it the fastest


@dataclass(frozen=True)
class Pair:
    """A model and the memory that PyTorch may take."""

    model: str
    cap_gib: float


PAIRS = (
    Pair("llava-1.5-7b", 7.25),
    Pair("llava-1.5-7b", 11.0),
    Pair("llava-1.5-7b", 30.0),
    Pair("qwen3-vl-2b", 3.5),
    Pair("qwen3-vl-2b", 7.25),
    Pair("qwen3-vl-2b", 15.0),
)
CHECKPOINTED_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the decoder layers
BATCHES = (1, 2, 4, 8)


def settings_of(model: str, **changes: Any) -> TrainingConfig:
    """Preset ultra_low_memory, not bound to what it fixes, with `changes` by the paths' last names."""
    config = ConfigPresets.ultra_low_memory(
        overrides={
            "model.name": model,
            "model.random_weights_seed": 0,
            "training.gradient_accumulation_steps": NUM_SAMPLES,
        }
    )
    paths = {
        "checkpointing": "hardware.gradient_checkpointing",
        "checkpointed_layers": "hardware.checkpointed_layers",
        "batch": "training.batch_size",
        "accumulation": "training.gradient_accumulation_steps",
        "cap_gib": "hardware.cap_gib",
    }
    changed = with_changes(config, {"preset": None, **{paths[name]: value for name, value in changes.items()}})
    assert changed is not None
    return changed


def card_of(pair: Pair) -> GpuFacts:
    """The measured card, with as much memory as the cap and the CUDA context take."""
    return replace(get_gpu(CARD), vram_bytes=round(pair.cap_gib * GIB) + CONTEXT_BYTES)


def plan_pair(pair: Pair) -> dict[str, Any]:
    """What the search chooses."""
    started = time.perf_counter()
    config, spec, card = settings_of(pair.model), registry.get(pair.model), card_of(pair)
    rates, _ = attained()

    def workload_of(variant: TrainingConfig) -> Any:
        return largest_workload(variant, spec)

    chosen = search(config, spec, card, reserve_bytes=0, fixed=(), workload_of=workload_of, rates=rates)
    searched_s = time.perf_counter() - started
    row = {
        "model": pair.model,
        "cap_gib": pair.cap_gib,
        "fits": chosen.fits,
        "batch_size": chosen.config["training"]["batch_size"],
        "checkpointing": chosen.config["hardware"]["gradient_checkpointing"],
        "checkpointed_layers": chosen.config["hardware"]["checkpointed_layers"],
        "planned_step_s": None if chosen.time is None else chosen.time.step_s,
        "search_s": searched_s,
    }
    print(row, flush=True)
    return row


class OnCard:
    """One model on the GPU, on which settings are tried one after the other."""

    def __init__(self, model: str) -> None:
        self._device = torch.device("cuda")
        config = settings_of(model)
        self._spec = registry.get(model)
        precision = choose_precision(config.hardware.mixed_precision, self._device)
        self._loaded: LoadedModel = load_model(config, self._spec, self._device, precision)
        attach_adapters(self._loaded, config)
        self.num_layers = len(self._spec.family.decoder_layers(self._loaded.model))

    def run(self, config: TrainingConfig, fastest_s: float) -> dict[str, Any]:
        """Step time and peaks of `config`; `out_of_memory` where it does not fit the cap.

        Args:
            config: settings that need no other model.
            fastest_s: step time of the fastest settings so far; what is far above it is timed once.
        """
        gc.collect()
        torch.cuda.empty_cache()
        total_bytes = torch.cuda.get_device_properties(self._device).total_memory
        cap_gib = config.hardware.cap_gib
        torch.cuda.set_per_process_memory_fraction(1.0 if cap_gib is None else cap_gib * GIB / total_bytes)
        torch.cuda.reset_peak_memory_stats()
        forwards = {layer: layer.forward for layer in self._spec.family.decoder_layers(self._loaded.model)}
        checkpoint_as_configured(config, self._spec, self._loaded.model)
        try:
            return {"out_of_memory": False, "step_s": self._step_s(config, fastest_s)} | {
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "allocated_bytes": torch.cuda.max_memory_allocated(),
            }
        except torch.OutOfMemoryError:
            return {"out_of_memory": True}
        finally:
            for layer in forwards:
                vars(layer).pop("forward", None)
            self._loaded.model.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()  # else the next model's weights lie scattered in what this run has left
            torch.cuda.set_per_process_memory_fraction(1.0)

    def _step_s(self, config: TrainingConfig, fastest_s: float) -> float:
        batch = largest_workload(config, self._spec).batch.pin_memory()
        compute = build_compute(config, self._device, self._loaded.precision)
        step = build_step(config, self._spec, self._loaded.model, compute, num_steps=10)
        micro_batches = [batch] * config.training.gradient_accumulation_steps

        def seconds(batches: list[Any]) -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(batches, batch.num_target_tokens * len(batches))
            step.apply(step.finish_gradients())
            torch.cuda.synchronize()
            return time.perf_counter() - started

        seconds(micro_batches[:1])  # the optimizer's states come into being
        times = [seconds(micro_batches)]
        while len(times) < NUM_TIMED and times[0] < FAR_ABOVE * fastest_s:
            times.append(seconds(micro_batches))
        return min(times)


def measure(plans: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each planned row beside the measured grid under its cap."""
    for model in dict.fromkeys(plan["model"] for plan in plans):
        card = OnCard(model)
        for plan in [plan for plan in plans if plan["model"] == model]:
            yield {**plan, **_measured(card, plan)}
        del card
        gc.collect()  # a model is a cycle: freed only while the next one is loaded, its memory would be kept scattered
        torch.cuda.empty_cache()


def _measured(card: OnCard, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen settings and the grid, each run under the cap, and how much slower than the best the chosen are.

    Settings that came near the fastest run again, in turns: a machine is not equally fast throughout.
    """
    names = ("checkpointing", "checkpointed_layers", "batch_size")
    every = [_run_under_cap(card, plan, {name: plan[name] for name in names}, math.inf)]
    for settings in _grid(card.num_layers):
        every.append(_run_under_cap(card, plan, settings, _fastest_s(every)))
    near = [run for run in every if not run["out_of_memory"] and run["step_s"] < NEAR * _fastest_s(every)]
    for _ in range(NUM_TURNS if len(near) > 1 else 0):
        for run in near:
            again = _run_under_cap(card, plan, {name: run[name] for name in names}, _fastest_s(every))
            run["step_s"] = min(run["step_s"], again["step_s"])
    chosen, *grid = every
    result = {"chosen": chosen, "grid": grid}
    if not chosen["out_of_memory"]:
        result["slower_than_fastest"] = chosen["step_s"] / _fastest_s(every) - 1
    return result


def _fastest_s(runs: Iterable[Mapping[str, Any]]) -> float:
    return min((run["step_s"] for run in runs if not run["out_of_memory"]), default=math.inf)


def _grid(num_layers: int) -> Iterator[dict[str, Any]]:
    for share in CHECKPOINTED_SHARES:
        for batch in BATCHES:
            some = round(share * num_layers) if 0 < share < 1 else None
            yield {"checkpointing": share > 0, "checkpointed_layers": some, "batch_size": batch}


def _run_under_cap(
    card: OnCard, plan: Mapping[str, Any], settings: Mapping[str, Any], fastest_s: float
) -> dict[str, Any]:
    batch = settings["batch_size"]
    config = settings_of(
        plan["model"],
        cap_gib=plan["cap_gib"],
        checkpointing=settings["checkpointing"],
        checkpointed_layers=settings["checkpointed_layers"],
        batch=batch,
        accumulation=NUM_SAMPLES // batch,
    )
    return {**settings, **card.run(config, fastest_s)}


def main() -> None:
    """Plan or measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["plan", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--models", nargs="*", help="measure only these")
    parser.add_argument("--caps-gib", nargs="*", type=float, help="measure only these")
    arguments = parser.parse_args()
    conditions = {"card": CARD, "num_samples": NUM_SAMPLES}
    if arguments.what == "plan":
        write_record(
            arguments.out, name="search_plans", figures={"pairs": [plan_pair(p) for p in PAIRS]}, conditions=conditions
        )
        return
    plans = json.loads(arguments.plans.read_text())["figures"]["pairs"]
    pairs = []
    wanted = [
        plan
        for plan in plans
        if (not arguments.models or plan["model"] in arguments.models)
        and (not arguments.caps_gib or plan["cap_gib"] in arguments.caps_gib)
    ]
    for row in measure(wanted):
        print(row, flush=True)
        pairs.append(row)  # written after each, so that a call that is cut off leaves what it measured
        write_record(arguments.out, name="search_accuracy", figures={"pairs": pairs}, conditions=conditions)


if __name__ == "__main__":
    main()
