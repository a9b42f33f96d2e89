"""What the planner says of the runs that `benchmarks/full_size.py` measured on a GPU, on a machine without one.

usage: python -m benchmarks.plan_accuracy --work FOLDER --out RECORD.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.full_size import write_data
from benchmarks.record import write_record

from eightgig import registry
from eightgig.config import ConfigPresets, TrainingConfig
from eightgig.core.units import GIB
from eightgig.data.encode import Encoder
from eightgig.data.loader import validation_batches
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart
from eightgig.models.load import load_processor
from eightgig.plan.allocator import AllocatorSettings, replay
from eightgig.plan.plan import planned_precision
from eightgig.plan.simulate import simulate
from eightgig.plan.workload import Workload

MEASURED = Path(__file__).parent / "results" / "full_size.json"
H100 = (9, 0)


def read_samples(path: Path) -> list[Sample]:
    """The samples of `write_data`."""
    samples = []
    for line, text in enumerate(path.read_text().splitlines(), start=1):
        record = json.loads(text)
        question = Message("user", (ImagePart(path=path.parent / record["image"]), TextPart(record["question"])))
        answer = Message("assistant", (TextPart(record["answer"]),))
        samples.append(Sample(str(line), (question, answer), SourceRef(path, line)))
    return samples


def settings_of(run: Mapping[str, Any]) -> TrainingConfig:
    """The settings that the measured `run` had."""
    overrides = {
        "model.name": run["model"],
        "model.random_weights_seed": 0,
        "hardware.mixed_precision": run["precision"],
        "training.gradient_accumulation_steps": 1,
    }
    return ConfigPresets.ultra_low_memory(overrides=overrides)


def predict(run: Mapping[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """The row of the measured `run`, planned for its sample with the most tokens."""
    started = time.perf_counter()
    config, spec = settings_of(run), registry.get(run["model"])
    processor = load_processor(config, spec)
    spec.family.apply_image_px(None, processor, config.data.image_size)
    encoder = Encoder(processor, spec.family, max_length=config.data.max_length)
    batches = list(validation_batches(encoder, samples, batch_size=1))
    index = next(i for i, batch in enumerate(batches) if batch.num_tokens == run["num_tokens_a_step"])
    work = Workload(processor, encoder, (samples[index],), batches[index], num_generated=1)
    result = replay(simulate(config, spec, work, planned_precision(config, None), H100).trace, AllocatorSettings())
    planned = {"allocated": result.peak_allocated_bytes / GIB, "reserved": result.peak_reserved_bytes / GIB}
    row = {key: run[key] for key in ("model", "precision", "num_tokens_a_step")}
    for kind, gib in planned.items():
        measured = run[f"peak_{kind}_gib"]
        row |= {f"planned_{kind}_gib": gib, f"peak_{kind}_gib": measured, f"{kind}_error": gib / measured - 1}
    return row | {"planning_s": time.perf_counter() - started}


def main() -> None:
    """Plan every measured run and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    samples = read_samples(write_data(arguments.work))
    measured = json.loads(MEASURED.read_text())
    rows = [predict(run, samples) for run in measured["figures"]["runs"]]
    figures = {
        "runs": rows,
        "worst_allocated_error": max((row["allocated_error"] for row in rows), key=abs),
        "worst_reserved_error": max((row["reserved_error"] for row in rows), key=abs),
    }
    conditions = {"measured": measured["commit"], "measured_with": measured["versions"], "on": measured["device"]}
    write_record(arguments.out, name="plan_accuracy", figures=figures, conditions=conditions)


if __name__ == "__main__":
    main()
