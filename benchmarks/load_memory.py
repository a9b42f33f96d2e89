"""What loading a model from a checkpoint on the disk takes of the host's memory and of the GPU's, weights in RAM.

usage: python -m benchmarks.load_memory --work FOLDER --out RECORD.json [--model llava-1.5-13b] [--streamed 40]

A full-size checkpoint with random weights is written in bf16 shards of 4 GB. A fresh process then loads it with the
4-bit weights of `--streamed` layers and the table of embeddings in RAM, and takes one optimizer step of one sample.
This process reads the other's RssAnon from /proc/PID/status every 50 ms: anonymous memory, pinned pages among it,
without mapped pages of the checkpoint's files, which the system takes back when it needs them. What stays by design is
the blocks of the streamed layers and the table. With the default model 27 GB must be free on the disk of FOLDER.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.record import write_record

from eightgig.config import MixedPrecision, TrainingConfig
from eightgig.core.units import GIB
from eightgig.memory.segments import prefer_expandable_segments
from eightgig.models.adapters import attach_adapters
from eightgig.models.load import load_model
from eightgig.models.precision import choose_precision
from eightgig.models.random_weights import build_random
from eightgig.plan.workload import build_encoder, largest_workload
from eightgig.registry import resolve
from eightgig.step.build import build_compute, build_step, checkpoint_as_configured

SHARD_SIZE = "4GB"
SAMPLE_EVERY_S = 0.05
ALLOWED_BYTES = 3 * GIB  # above what stays in RAM by design: bar 5 of issue 5
MAX_LENGTH = 448  # text tokens of the sample of the step
RESULT = "RESULT "


def write_checkpoint(model: str, folder: Path, device: torch.device) -> None:
    """A checkpoint of the registry's `model` with random bf16 weights, and its stand-in processor, in `folder`."""
    spec = resolve(model)
    dtype = torch.bfloat16
    made = build_random(spec, seed=0, device=device, dtype=dtype, quantization_config=None)
    made.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    config = TrainingConfig.model_validate({"model": {"name": model, "random_weights_seed": 0}})
    build_encoder(config, spec)[1].save_pretrained(folder)


def load_and_step(folder: Path, num_streamed: int, device: torch.device) -> dict[str, Any]:
    """Load the checkpoint in `folder` as a run does, take a step, and say what was taken; times by `time.monotonic`."""
    prefer_expandable_segments()
    if device.type == "cuda":
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # context and cuBLAS are there
    config = _config(folder, num_streamed, device)
    precision = choose_precision(MixedPrecision.BF16, device)
    before_bytes, begin_s = anonymous_bytes("self"), time.monotonic()
    loaded = load_model(config, resolve(str(folder)), device, precision)
    load_peak = _gpu_peak(device)
    end_s = time.monotonic()
    assert loaded.streamed is not None
    table_bytes = sum(row.bytes_now for row in loaded.receipt.rows if row.on_host and not row.is_4bit)
    after_bytes = anonymous_bytes("self")
    attach_adapters(loaded, config)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    work = largest_workload(config, loaded.spec)
    step = build_step(config, loaded.spec, loaded.model, build_compute(config, device, precision), num_steps=1)
    step([work.batch], work.batch.num_target_tokens)
    step.apply(step.finish_gradients())
    return {
        "begin_s": begin_s,
        "end_s": end_s,
        "before_bytes": before_bytes,
        "after_bytes": after_bytes,
        "streamed_bytes": loaded.streamed.host_bytes,
        "table_bytes": table_bytes,
        "num_tokens": work.batch.num_tokens,
        "gpu": {"loading": load_peak, "step": _gpu_peak(device)},
    }


def _config(folder: Path, num_streamed: int, device: torch.device) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "data": {"max_length": MAX_LENGTH},
            "training": {
                "gradient_accumulation_steps": 1,
                "optimizer": "paged_adamw_8bit" if device.type == "cuda" else "adamw",
                "lora": {"rank": 16, "alpha": 32},
            },
            "hardware": {"device": device.type, "streamed_layers": num_streamed, "embedding_on_host": True},
        }
    )


def _gpu_peak(device: torch.device) -> dict[str, int] | None:
    """The most that PyTorch held of the GPU since this was asked last; None without one."""
    if device.type != "cuda":
        return None
    peak = {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def anonymous_bytes(process: int | str) -> int:
    """RssAnon of `process`, as proc_pid_status(5) has it; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")), "0")
    return int(kib) * 1024


def watched(command: Sequence[str], output: Path) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """What `command` tells in its line of RESULT, and its anonymous memory every 50 ms with the times."""
    samples = []
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            samples.append((time.monotonic(), anonymous_bytes(process.pid)))
            time.sleep(SAMPLE_EVERY_S)
    lines = output.read_text(encoding="utf-8").splitlines()
    if process.returncode != 0:
        raise SystemExit("\n".join(lines[-30:]))
    line = next(line for line in reversed(lines) if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT)), samples


def figures_of(told: dict[str, Any], samples: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The record's figures, of what the process told and of the samples between the begin and the end of loading."""
    loading = [taken for at_s, taken in samples if told["begin_s"] <= at_s <= told["end_s"]]
    peak_bytes = max([*loading, told["before_bytes"], told["after_bytes"]])
    by_design_bytes = told["streamed_bytes"] + told["table_bytes"]
    return {
        "loading_s": told["end_s"] - told["begin_s"],
        "num_samples": len(loading),
        "anonymous_before_bytes": told["before_bytes"],
        "anonymous_peak_bytes": peak_bytes,
        "anonymous_after_bytes": told["after_bytes"],
        "by_design_bytes": by_design_bytes,
        "above_design_bytes": peak_bytes - by_design_bytes,
        "allowed_above_design_bytes": ALLOWED_BYTES,
        "within_bar": peak_bytes - by_design_bytes <= ALLOWED_BYTES,
        "gpu_peak_loading": told["gpu"]["loading"],
        "gpu_peak_step": told["gpu"]["step"],
        "num_tokens_of_step": told["num_tokens"],
    }


def main() -> None:
    """Write the checkpoint, load it in another process, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="llava-1.5-13b")
    parser.add_argument("--streamed", type=int, default=40)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", choices=("write", "load"), help="what this process does; all, in others, if left out")
    arguments = parser.parse_args()
    folder, device = arguments.work / "checkpoint", torch.device(arguments.device)
    if arguments.only == "write":
        write_checkpoint(arguments.model, folder, device)
        return
    if arguments.only == "load":
        print(RESULT + json.dumps(load_and_step(folder, arguments.streamed, device)), flush=True)
        return
    if arguments.out is None:
        parser.error("--out says where the record goes")
    arguments.work.mkdir(parents=True, exist_ok=True)
    again = [sys.executable, "-m", "benchmarks.load_memory", *sys.argv[1:], "--only"]
    if not folder.exists():
        subprocess.run([*again, "write"], check=True)
    told, samples = watched([*again, "load"], arguments.work / "load.log")
    figures = figures_of(told, samples)
    print(json.dumps(figures), flush=True)
    shards = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    conditions = {
        "model": arguments.model,
        "weights": "random, bf16",
        "shard_bytes": shards,
        "num_streamed_layers": arguments.streamed,
        "embedding_on_host": True,
        "sampled_every_s": SAMPLE_EVERY_S,
    }
    write_record(arguments.out, name="load_memory", figures=figures, conditions=conditions)


if __name__ == "__main__":
    main()
