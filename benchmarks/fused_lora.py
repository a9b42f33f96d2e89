"""What adapters that are computed together save: launches and memory as the planner says, and the demo's time.

usage: python -m benchmarks.fused_lora --out RECORD.json [--demo-steps 20] [--demo-rounds 2]    (no GPU)

Launches of one decoder layer of LLaVA-1.5-7B, forward and backward pass of a micro-batch, are what four layers more
add to a simulated run of four; of the whole model, plans of 1,024 tokens (576 of them a picture, rank 16) for an H100
and an RTX 4060. The demonstration trains for some steps on the CPU with and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

from eightgig import registry
from eightgig.app.demonstration import demo_config
from eightgig.app.training import train
from eightgig.config import TrainingConfig
from eightgig.demo.charts import write_task
from eightgig.plan.op_costs import OpCost
from eightgig.plan.plan import capability_of, plan, planned_precision
from eightgig.plan.simulate import simulate
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec
from eightgig.registry.gpus import get_gpu
from eightgig.train.events import SilentListener

MODEL = "llava-1.5-7b"
TEXT_TOKENS = 448  # with a picture's 576: 1,024
COUNTED_LAYERS = (4, 8)
CARDS = ("H100 SXM", "RTX 4060")


def config_of(*, fused: bool, checkpoints: bool) -> TrainingConfig:
    """One row of 1,024 tokens."""
    return TrainingConfig.model_validate(
        {
            "model": {"name": MODEL},
            "data": {"max_length": TEXT_TOKENS},
            "training": {"batch_size": 1, "gradient_accumulation_steps": 1, "lora": {"rank": 16}},
            "hardware": {"fused_lora": fused, "gradient_checkpointing": checkpoints},
            "validation": {"num_generated": 0},
        }
    )


def with_layers(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """The model with so many decoder layers."""
    facts = spec.facts
    text = {**facts.architecture["text_config"], "num_hidden_layers": num_layers}
    architecture = {**facts.architecture, "text_config": text}
    num_linears = facts.num_language_linears // facts.architecture["text_config"]["num_hidden_layers"] * num_layers
    return replace(spec, facts=replace(facts, architecture=architecture, num_language_linears=num_linears))


def launches(costs: Mapping[OpCost, float]) -> dict[str, float]:
    """Operations that launch something, and the kernels that they launch."""
    return {
        "operations": sum(costs.values()),
        "kernels": sum(cost.num_kernels * count for cost, count in costs.items()),
    }


def launches_of_a_layer(*, fused: bool, checkpoints: bool) -> dict[str, Any]:
    """Of forward and backward pass; with checkpointing of both forward passes."""
    config, gpu = config_of(fused=fused, checkpoints=checkpoints), get_gpu(CARDS[0])
    counts = []
    for num_layers in COUNTED_LAYERS:
        spec = with_layers(registry.get(MODEL), num_layers)
        work = largest_workload(config, spec)
        simulation = simulate(config, spec, work, planned_precision(config, gpu), capability_of(gpu))
        counts.append(launches(simulation.micro_batch_costs))
    few, many = COUNTED_LAYERS
    told = {name: (counts[1][name] - counts[0][name]) / (many - few) for name in counts[0]}
    return {"fused_lora": fused, "gradient_checkpointing": checkpoints, **told}


def planned(card: str, *, fused: bool, checkpoints: bool) -> dict[str, Any]:
    """The plan of the whole model."""
    config = config_of(fused=fused, checkpoints=checkpoints)
    made = plan(config, registry.get(MODEL), get_gpu(card), reserve_bytes=0)
    return {
        "card": card,
        "fused_lora": fused,
        "gradient_checkpointing": checkpoints,
        "fits": made.fits,
        "allocated_bytes": made.peak.allocated_bytes,
        "reserved_bytes": made.peak.reserved_bytes,
        "step_s": None if made.time is None else made.time.step_s,
    }


def demo_steps(work: Path, num_steps: int, num_rounds: int) -> list[dict[str, Any]]:
    """Times of the demonstration's steps, with and without in turns; the first step of each run is left out."""
    images = write_task(work / "data", seed=0, num_train_images=320, num_test_images=20)
    plain = demo_config(images, output_dir=work / "runs", seed=0)
    training = plain.training.model_copy(update={"max_steps": num_steps})
    validation = plain.validation.model_copy(update={"every_steps": None, "num_generated": 0})
    rows = []
    for _ in range(num_rounds):
        for fused in (False, True):
            hardware = plain.hardware.model_copy(update={"fused_lora": fused})
            config = plain.model_copy(update={"training": training, "validation": validation, "hardware": hardware})
            outcome = train(config, sources={}, run_folder=None, listener=SilentListener(), command="benchmark")
            lines = map(json.loads, (outcome.run_folder / "metrics.jsonl").read_text().splitlines())
            steps = [line for line in lines if line["kind"] == "step"]
            times_s = [step["step_s"] for step in steps[1:]]
            row = {
                "fused_lora": fused,
                "median_step_s": statistics.median(times_s),
                "least_step_s": min(times_s),
                "last_loss": steps[-1]["loss"],
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Count, plan, train, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--demo-steps", type=int, default=20)
    parser.add_argument("--demo-rounds", type=int, default=2)
    arguments = parser.parse_args()
    cases = [(fused, checkpoints) for checkpoints in (True, False) for fused in (False, True)]
    layer = [launches_of_a_layer(fused=fused, checkpoints=checkpoints) for fused, checkpoints in cases]
    print(*layer, sep="\n", flush=True)
    plans = [planned(card, fused=fused, checkpoints=checkpoints) for card in CARDS for fused, checkpoints in cases]
    print(*plans, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        demo = demo_steps(Path(work), arguments.demo_steps, arguments.demo_rounds)
    figures = {"layer": layer, "plans": plans, "demo": demo}
    conditions = {"model": MODEL, "tokens": TEXT_TOKENS + 576, "rank": 16, "demo_steps": arguments.demo_steps}
    write_record(arguments.out, name="fused_lora", figures=figures, conditions=conditions)


if __name__ == "__main__":
    main()
