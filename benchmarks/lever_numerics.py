"""Whether the levers change what is computed at full size: per-token losses, the whole gradient, a curve of losses.

usage: python -m benchmarks.lever_numerics --work FOLDER --out RECORD.json [--only NAME ...] [--at-once 6]
           [--limit-s 520]

LLaVA-1.5-7B, random weights, one row of 1,024 tokens, random adapters (with B of zeros no gradient of A would be
compared), bf16. Each lever alone and all together, each in a process of its own on the same row from the same
adapters, against the plain path: no layer checkpointed, the loss of all targets at once, all weights resident, pixels,
fp32 AdamW. Runs go side by side, so no times are recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.lever_runs import LeverRun, Prepared, fed_batch, load, prepare, random_batch, take_step
from benchmarks.levers_8gb import output_of
from benchmarks.record import write_record
from torch import Tensor, nn

from eightgig.memory.segments import prefer_expandable_segments
from eightgig.models.trainable import trainable_parameters
from eightgig.step.build import build_compute
from eightgig.step.loss import Targets

PLAIN_NAME = "plain"
PLAIN = {"gradient_checkpointing": False, "loss_chunk_tokens": 1 << 20, "optimizer": "adamw"}
CHECKPOINTED = PLAIN | {"gradient_checkpointing": True}
LEVERS: Mapping[str, Mapping[str, Any]] = {
    PLAIN_NAME: PLAIN,
    "checkpointing": CHECKPOINTED,
    "half-checkpointed": CHECKPOINTED | {"checkpointed_layers": 16},
    "offload": CHECKPOINTED | {"offload_layer_inputs": True},
    "tiles": PLAIN | {"mlp_tile_tokens": 300},  # a row's last tile is a shorter one
    "projections": CHECKPOINTED | {"mlp_tile_tokens": 300, "tiled_projections": True},
    "loss-chunks": PLAIN | {"loss_chunk_tokens": 100},
    "features": PLAIN | {"cache_image_features": True},
    "embedding": PLAIN | {"embedding_on_host": True},
    "streamed": PLAIN | {"streamed_layers": 32},
    "fused-lora": PLAIN | {"fused_lora": True},
    "paged-8bit": PLAIN | {"optimizer": "paged_adamw_8bit"},
    "all": {
        "offload_layer_inputs": True,
        "mlp_tile_tokens": 300,
        "tiled_projections": True,
        "loss_chunk_tokens": 100,
        "cache_image_features": True,
        "embedding_on_host": True,
        "streamed_layers": 32,
        "optimizer": "paged_adamw_8bit",
    },
}
NUM_CURVE_STEPS = 50
LORA_B_STD = 0.02  # of the size of the frozen weights (transformers' initializer_range)
BARS = {"token_losses": 1e-3, "gradient": 0.03, "curve": 0.02}  # issue 5


def run_of(name: str, model: str = "llava-1.5-7b", tokens: int = 1024, **changes: Any) -> LeverRun:
    """The run with the levers of `name`."""
    return replace(LeverRun(name, model, tokens, LEVERS[name], num_steps=NUM_CURVE_STEPS), **changes)


def randomise_lora_b(model: nn.Module, seed: int) -> None:
    """Adapters whose B is not zero; drawn on the host, so that they are the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data.copy_(LORA_B_STD * torch.randn(value.shape, generator=generator))


def numbers_of(run: LeverRun, device: torch.device) -> dict[str, Tensor]:
    """Per-token losses and the whole gradient, fp32 on the host, then the losses of `run.num_steps` steps."""
    config = run.config(device.type)
    loaded = load(run, device)
    randomise_lora_b(loaded.model, seed=2)
    batch = random_batch(run, loaded)
    if config.hardware.levers.cache_image_features:
        _, batch = fed_batch(loaded, build_compute(config, device, loaded.precision), batch)
    prepared = prepare(run, loaded, batch)
    token_losses = _token_losses(prepared, config.training.loss_chunk_tokens)
    prepared.step([batch], batch.num_target_tokens)
    gradients = [value.grad for value in trainable_parameters(loaded.model).values()]
    whole = torch.cat([gradient.flatten().float().cpu() for gradient in gradients if gradient is not None])
    loaded.model.zero_grad(set_to_none=True)
    losses = [take_step(prepared)["loss"] for _ in range(run.num_steps)]
    return {"token_losses": token_losses, "gradient": whole, "curve": torch.tensor(losses)}


def _token_losses(prepared: Prepared, chunk_tokens: int) -> Tensor:
    """-log p of each target, by a forward pass as in training, fp32 [targets]."""
    loaded, compute, family = prepared.loaded, prepared.compute, prepared.loaded.spec.family
    loaded.model.train()
    moved = prepared.batch.to(compute.device, compute.input_dtype)
    targets = Targets.from_labels(prepared.batch.labels).to(compute.device)
    with compute.autocast():
        hidden = family.hidden_states(loaded.model, moved.model_inputs).detach()
        states = hidden.flatten(0, 1).index_select(0, targets.positions)
        with torch.no_grad():
            parts = [
                nn.functional.cross_entropy(family.logits(loaded.model, part).float(), tokens, reduction="none")
                for part, tokens in zip(
                    torch.split(states, chunk_tokens), torch.split(targets.tokens, chunk_tokens), strict=True
                )
            ]
    return torch.cat(parts).cpu()


def compared(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Any]:
    """How far a run is from the plain one.

    Per-token losses and gradient: the norm of the difference by the plain path's norm; the curve: the largest
    difference of a step's loss by that loss.
    """
    relative = {
        key: float((ours[key].double() - plain[key].double()).norm() / plain[key].double().norm())
        for key in ("token_losses", "gradient")
    }
    curve = (ours["curve"].double() - plain["curve"].double()).abs() / plain["curve"].double().abs()
    errors = relative | {"curve": float(curve.max())}
    return {
        "errors": errors,
        "largest_token_loss_difference": float((ours["token_losses"] - plain["token_losses"]).abs().max()),
        "curve": ours["curve"].tolist(),
        "holds": {key: errors[key] <= bar for key, bar in BARS.items()},
    }


def main() -> None:
    """Run each in its own process, compare each with the plain one as it ends, write the record each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--limit-s", type=float, default=520)
    parser.add_argument("--one", choices=list(LEVERS))
    arguments = parser.parse_args()
    prefer_expandable_segments()
    if arguments.one is not None:
        written = arguments.work / f"{arguments.one}.part"
        torch.save(numbers_of(run_of(arguments.one), torch.device("cuda")), written)
        os.replace(written, written.with_suffix(".pt"))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in LEVERS if not arguments.only or name in arguments.only or name == PLAIN_NAME]
    end = time.perf_counter() + arguments.limit_s
    rows: dict[str, Any] = {}
    lock = threading.Lock()

    def run_alone(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.lever_numerics", "--work", str(arguments.work), "--one", name]
        printed = output_of(command, end - time.perf_counter())
        with lock:
            if not (arguments.work / f"{name}.pt").exists():
                rows[name] = {"error": printed[-2000:]}
            write_all()

    def write_all() -> None:
        plain_path = arguments.work / f"{PLAIN_NAME}.pt"
        if not plain_path.exists():
            return
        plain = torch.load(plain_path)
        for name in names:
            path = arguments.work / f"{name}.pt"
            if name not in rows and path.exists():
                rows[name] = compared(torch.load(path), plain)
                print(name, {key: rows[name][key] for key in ("errors", "holds")}, flush=True)
        figures = {"levers": [{"name": name, "settings": dict(LEVERS[name]), **rows[name]} for name in rows]}
        conditions = {"model": run_of(PLAIN_NAME).model, "tokens": 1024, "rank": 16, "bars": BARS}
        write_record(arguments.out, name="lever_numerics", figures=figures, conditions=conditions)

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(run_alone, names))
    print(json.dumps({name: row.get("holds", "failed") for name, row in rows.items()}), flush=True)


if __name__ == "__main__":
    main()
