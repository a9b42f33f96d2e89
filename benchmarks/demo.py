"""The demonstration for several seeds, and what the trained model says when it can't see.

usage: python -m benchmarks.demo --work FOLDER --out RECORD.json [--seeds 0 1 2]

For each seed: `eightgig demo` as a user runs it, then the trained model on the same 200 questions with blank pictures
and with the pictures of other questions. Answers that a model gives without seeing would show in both.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write_record
from peft import PeftModel
from PIL import Image

from eightgig.app.demonstration import run_demo
from eightgig.config import load_config
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import ImagePart, Message, Sample
from eightgig.data.sources import load_samples
from eightgig.evaluate.generate import generate_answers
from eightgig.models.load import load_model
from eightgig.registry import resolve
from eightgig.step.build import build_compute
from eightgig.train.events import SilentListener
from eightgig.train.setup import choose_place

WELL_FORMED = re.compile(r"\d{1,2}")  # a whole number; which ones there are is the task's to teach


def with_images(samples: tuple[Sample, ...], images: list[ImagePart]) -> list[Sample]:
    """`samples` with their one image replaced by the image at the same place of `images`."""
    changed = []
    for sample, image in zip(samples, images, strict=True):
        messages = tuple(
            Message(message.role, tuple(image if isinstance(part, ImagePart) else part for part in message.parts))
            for message in sample.messages
        )
        changed.append(replace(sample, messages=messages))
    return changed


def exact_match_without_sight(run: Path, work: Path) -> dict[str, float]:
    """Exact match of the run's adapter with blank pictures, and with each question's picture moved on by one place."""
    config = load_config(run / "config.json").config
    spec = resolve(config.model.name)
    place = choose_place(config)
    loaded = load_model(config, spec, place.device, place.precision)
    model = PeftModel.from_pretrained(loaded.model, str(run / "adapter"))
    encoder = Encoder(loaded.processor, spec.family, max_length=config.data.max_length)
    assert config.data.val_path is not None
    samples = load_samples(config.data.val_path, None, Quarantine(work / "quarantine.jsonl")).samples
    blank = work / "blank.png"
    Image.new("RGB", (128, 128), (127, 127, 127)).save(blank)
    images = [sample.images[0] for sample in samples]
    sights = {"blank": [ImagePart(path=blank)] * len(samples), "shuffled": [*images[1:], images[0]]}
    shares = {}
    for name, shown in sights.items():
        generations = generate_answers(
            model,
            encoder,
            with_images(samples, shown),
            build_compute(config, place.device, place.precision),
            batch_size=config.training.batch_size,
            max_new_tokens=config.validation.max_new_tokens,
        )
        shares[name] = statistics.mean(generation.correct for generation in generations)
    return shares


def measure(seed: int, work: Path) -> dict[str, Any]:
    """All figures of one seed."""
    outcome = run_demo(output_dir=work, seed=seed, listener=SilentListener())
    metrics = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in metrics if record["kind"] == "step"]
    generations = [json.loads(line) for line in (outcome.run / "generations.jsonl").read_text().splitlines()]
    before = [row["answer"] for row in generations if row["step"] == 0]
    receipt = json.loads((outcome.run / "receipt.json").read_text())
    trained = [row["group"] for row in receipt["rows"] if row["num_trainable"]]
    without_sight = exact_match_without_sight(outcome.run, work)
    return {
        "seed": seed,
        "exact_match_before": outcome.before,
        "exact_match_after": outcome.after,
        "num_images": outcome.num_images,
        "num_steps": len(steps),
        "train_s": outcome.train_s,
        "step_s": statistics.median(record["step_s"] for record in steps),
        "host_peak_rss_bytes": json.loads((outcome.run / "memory.json").read_text())["host_peak_rss_bytes"],
        "share_well_formed_before": statistics.mean(WELL_FORMED.fullmatch(answer) is not None for answer in before),
        "exact_match_blank": without_sight["blank"],
        "exact_match_shuffled": without_sight["shuffled"],
        "trained_groups": trained,
        "asked": receipt["asked"],
        "compute_dtype": json.loads((outcome.run / "run.json").read_text())["precision"]["compute_dtype"],
    }


def main() -> None:
    """Measure every seed and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = [measure(seed, arguments.work) for seed in arguments.seeds]
    conditions = {
        "model": "eightgig-demo",
        "task": "values of coloured bars, read off a chart; 200 held-out pictures, one question each",
        "blank": "the same questions with a grey picture",
        "shuffled": "the same questions, each with the picture of the next one",
    }
    write_record(arguments.out, name="demo", figures={"seeds": figures}, conditions=conditions)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
