"""LLaVA-1.5-7B on an 8 GB budget: `eightgig train` beside transformers + PEFT + bitsandbytes, in one call.

usage: python -m benchmarks.llava_7b_8gb --peer-scripts FOLDER --work FOLDER --out RECORD.json [--rounds 2] [--steps 3]

Both sides: full size, random weights, one 336 px image (576 tokens) and 448 text tokens, LoRA rank 8, NF4 with double
quantisation, gradient checkpointing, bf16, and at most 7.25 GiB reserved by PyTorch. The peer script is
`peer_step.py hf`, which takes an optimizer step after each row; EightGig runs its preset `ultra_low_memory` from PNG
and JSONL files, which takes one after 32 rows. Rounds alternate between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.record import write_record
from PIL import Image

from eightgig import registry
from eightgig.config import ConfigPresets
from eightgig.core.units import GIB
from eightgig.data.encode import Encoder
from eightgig.data.sample import ImagePart, Message, Sample, SourceRef, TextPart

MODEL = "llava-1.5-7b"
CAP_GIB = 7.25
NUM_TEXT_TOKENS = 448
NUM_IMAGE_TOKENS = 576
QUESTION = "What is shown?"


def write_data(folder: Path, num_samples: int) -> Path:
    """JSONL with random 336 px pictures and answers so long that each sample has NUM_TEXT_TOKENS text tokens."""
    spec = registry.get(MODEL)
    config = ConfigPresets.ultra_low_memory(data_path="unused", val_path=None)
    encoder = Encoder(spec.family.build_processor(spec.facts), spec.family, max_length=config.data.max_length)
    answer = _answer_of_length(encoder, folder)
    generator = np.random.default_rng(0)
    records = []
    for index in range(num_samples):
        pixels = generator.integers(0, 256, (336, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _answer_of_length(encoder: Encoder, folder: Path) -> str:
    """Words and letters that, with the question and the template, come to NUM_TEXT_TOKENS text tokens."""
    words: list[str] = []
    picture = folder / "probe.png"
    Image.new("RGB", (336, 336)).save(picture)

    def measured(text: str) -> int:
        question = Message("user", (ImagePart(path=picture), TextPart(QUESTION)))
        sample = Sample("probe", (question, Message("assistant", (TextPart(text),))), SourceRef(folder, 0))
        return encoder.measure(sample).num_text_tokens

    while measured(" ".join([*words, "table"])) <= NUM_TEXT_TOKENS:
        words.append(("cat", "sitting", "image", "table")[len(words) % 4])
    text = " ".join(words)
    while measured(text) < NUM_TEXT_TOKENS:
        text += "z"
    assert measured(text) == NUM_TEXT_TOKENS, "the stand-in vocabulary has no single token for the last letters"
    return text


def run_peer(scripts: Path, checkpoint: Path) -> dict[str, Any]:
    """One measurement of transformers + PEFT + bitsandbytes."""
    shape = f"{NUM_TEXT_TOKENS + NUM_IMAGE_TOKENS}x1"
    command = [sys.executable, str(scripts / "peer_step.py"), "hf", str(checkpoint), shape, str(CAP_GIB), "8"]
    output = _run(command, {"STEPS": "24"})
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def run_eightgig(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One measurement of `eightgig train` with the preset as it stands; the first step, which warms up, is left out."""
    command = [sys.executable, "-m", "eightgig", "train", "--preset", "ultra_low_memory", "--model", MODEL]
    command += ["--random-weights", "0", "--cap-gib", str(CAP_GIB), "--data", str(data), "--run-folder", str(folder)]
    command += [
        "--max-steps",
        str(steps),
        "--set",
        "validation.max_new_tokens=8",
        "--set",
        "validation.num_generated=2",
    ]
    _run(command, {})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [record for record in records if record["kind"] == "step"][1:]
    memory = json.loads((folder / "memory.json").read_text())
    return {
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in timed),
        "row_s": statistics.median(record["step_s"] for record in timed) / 32,
        "data_wait_share": sum(r["data_wait_s"] for r in timed) / sum(r["step_s"] for r in timed),
        "num_tokens_per_step": timed[0]["num_tokens"],
        "losses": [record["loss"] for record in records if record["kind"] == "step"],
        "peak_allocated_gib": memory["peak_allocated_bytes"] / GIB,
        "peak_reserved_gib": memory["peak_reserved_bytes"] / GIB,
        "train_peak_allocated_gib": memory["phases"]["train"]["allocated_bytes"] / GIB,
        "device_used_gib": memory["device_used_bytes"] / GIB,
        "categories_bytes": memory["categories"],
        "verification": json.loads((folder / "verification.json").read_text()),
    }


def _run(command: list[str], extra: dict[str, str]) -> str:
    print("+", " ".join(command), flush=True)
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | extra)
    print(process.stdout[-3000:], process.stderr[-3000:], sep="\n", flush=True)
    if process.returncode != 0:
        raise SystemExit(f"{command[1:4]} ended with status {process.returncode}")
    return process.stdout


def main() -> None:
    """Measure both sides and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-scripts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True)
    data = write_data(arguments.work, num_samples=112)
    checkpoint = arguments.work / "llava-7b"
    _run([sys.executable, str(arguments.peer_scripts / "make_ckpt.py"), "llava-7b", str(checkpoint)], {})
    rounds = []
    for index in range(arguments.rounds):
        ours = run_eightgig(data, arguments.work / f"run-{index}", arguments.steps)
        peer = run_peer(arguments.peer_scripts, checkpoint)
        rounds.append({"eightgig": ours, "transformers_peft_bnb": peer})
    figures = {
        "rounds": rounds,
        "tokens_per_s": {
            "eightgig": statistics.median(r["eightgig"]["tokens_per_s"] for r in rounds),
            "transformers_peft_bnb": statistics.median(r["transformers_peft_bnb"]["tok_s"] for r in rounds),
        },
        "peak_allocated_gib": {
            "eightgig": max(r["eightgig"]["peak_allocated_gib"] for r in rounds),
            "transformers_peft_bnb": max(r["transformers_peft_bnb"]["peak_alloc_GiB"] for r in rounds),
        },
        "peak_reserved_gib": {
            "eightgig": max(r["eightgig"]["peak_reserved_gib"] for r in rounds),
            "transformers_peft_bnb": max(r["transformers_peft_bnb"]["peak_reserved_GiB"] for r in rounds),
        },
    }
    conditions = {
        "model": MODEL,
        "weights": "random, full size",
        "cap_gib": CAP_GIB,
        "rank": 8,
        "num_text_tokens": NUM_TEXT_TOKENS,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "eightgig": "preset ultra_low_memory: batch 1 x 32, an optimizer step after 32 rows, data loading included",
        "transformers_peft_bnb": "peer_step.py hf: batch 1, an optimizer step a row, inputs on the GPU already",
    }
    write_record(arguments.out, name="llava_7b_8gb", figures=figures, conditions=conditions)
    print(json.dumps({name: value for name, value in figures.items() if name != "rounds"}, indent=2))


if __name__ == "__main__":
    main()
