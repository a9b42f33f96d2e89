"""What each memory lever saves and what it costs, alone, against the run without it.

usage: python -m benchmarks.lever_prices --out RECORD.json [--model NAME ...] [--rounds 2] [--steps 5]

Full size, random weights, one row of 2,048 tokens, rank 16, no cap. Plain: no layer checkpointed, the loss of all
targets at once, all weights resident, pixels, fp32 AdamW. Rounds go over all levers, so that what else changes with
time falls on each; of each visit the first step, which makes the optimizer's states, is not timed. Weights that stay in
RAM want a model of their own, which lies beside the plain one; what the others hold is taken off. Bytes are allocated
ones, since what PyTorch reserves is shared by all. Those of paged optimizer states lie outside of them: they count as
saved, since they may leave the card.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.lever_numerics import CHECKPOINTED, PLAIN
from benchmarks.lever_runs import (
    LeverRun,
    Link,
    fed_batch,
    load,
    prepare,
    random_batch,
    take_step,
    without_levers,
)
from benchmarks.record import write_record

from eightgig.memory.segments import prefer_expandable_segments
from eightgig.models.load import LoadedModel
from eightgig.step.build import build_compute

TOKENS = 2048
TILE_TOKENS, CHUNK_TOKENS = 512, 256
MODELS = (LeverRun("plain", "llava-1.5-7b", TOKENS), LeverRun("plain", "qwen2.5-vl-7b", TOKENS, image_px=336))
RESIDENT: Mapping[str, Any] = {}
"""Settings that decide how a model is loaded: all weights on the card."""


@dataclass(frozen=True)
class Priced:
    """A lever: the settings that it changes, and the name of the run that it is set against.

    Attributes:
        settings: in the run with it, besides those of the run without.
        loading: those among them for which a model has to be loaded anew.
    """

    name: str
    settings: Mapping[str, Any]
    without: str | None = "plain"
    loading: Mapping[str, Any] = field(default_factory=dict)


def levers_of(num_layers: int) -> tuple[Priced, ...]:
    """The plain run first, then each lever behind the run that it is set against."""
    return (
        Priced("plain", PLAIN, None),
        Priced("all layers checkpointed", CHECKPOINTED),
        Priced("half of the layers checkpointed", CHECKPOINTED | {"checkpointed_layers": num_layers // 2}),
        Priced(
            "layer inputs on the host", CHECKPOINTED | {"offload_layer_inputs": True}, without="all layers checkpointed"
        ),
        Priced(f"MLP in tiles of {TILE_TOKENS} tokens", PLAIN | {"mlp_tile_tokens": TILE_TOKENS}),
        Priced(
            f"MLP in tiles of {TILE_TOKENS} tokens, all layers checkpointed",
            CHECKPOINTED | {"mlp_tile_tokens": TILE_TOKENS},
            without="all layers checkpointed",
        ),
        Priced(
            f"norms and projections in tiles of {TILE_TOKENS} tokens",
            CHECKPOINTED | {"mlp_tile_tokens": TILE_TOKENS, "tiled_projections": True},
            without=f"MLP in tiles of {TILE_TOKENS} tokens, all layers checkpointed",
        ),
        Priced(f"loss in chunks of {CHUNK_TOKENS} targets", PLAIN | {"loss_chunk_tokens": CHUNK_TOKENS}),
        Priced("image features kept", PLAIN | {"cache_image_features": True}),
        Priced("8-bit optimizer", PLAIN | {"optimizer": "adamw_8bit"}),
        Priced("paged 8-bit optimizer", PLAIN | {"optimizer": "paged_adamw_8bit"}),
        Priced("embeddings in RAM", PLAIN, loading={"embedding_on_host": True}),
        Priced("weights of all layers in RAM", PLAIN, loading={"streamed_layers": num_layers}),
        Priced("weights of half of the layers in RAM", PLAIN, loading={"streamed_layers": num_layers // 2}),
    )


class Bench:
    """One base model, loaded once for each place that its weights can be in, on which levers are tried."""

    def __init__(self, base: LeverRun, device: torch.device) -> None:
        self._base, self._device = base, device
        self._models: dict[tuple[Any, ...], tuple[LoadedModel, Link, int]] = {}
        resident = self._model(RESIDENT)[0]
        self.num_layers = len(base.spec.family.decoder_layers(resident.model))
        self._batch = random_batch(base, resident)

    def visit(self, priced: Priced, num_steps: int) -> dict[str, Any]:
        """Peak and times of `num_steps` steps, behind one that is not timed; the model is left as it was."""
        run = replace(self._base, levers={**priced.settings, **priced.loading}, num_steps=num_steps + 1)
        loaded, link, _ = self._model(priced.loading)
        config = run.config(self._device.type)
        pinned_before = link.transfers.host.num_bytes
        batch, fed = self._batch, None
        if config.hardware.levers.cache_image_features:
            fed, batch = fed_batch(loaded, build_compute(config, self._device, loaded.precision), batch)
        prepared = prepare(run, loaded, batch, link)
        others_bytes = sum(size for other, _, size in self._models.values() if other is not loaded)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            steps = [take_step(prepared) for _ in range(num_steps + 1)]
            peak_bytes = 0 if self._device.type != "cuda" else torch.cuda.max_memory_allocated() - others_bytes
        finally:
            without_levers(loaded)
            if fed is not None:
                fed.tower.to(self._device)
                fed.take_back()
            del prepared
            gc.collect()
        streamed = loaded.streamed
        return {
            "allocated_bytes": peak_bytes,
            "times_s": [step["step_s"] for step in steps[1:]],
            "moved_bytes": steps[-1]["moved_bytes"],
            "pinned_bytes": link.transfers.host.num_bytes
            - pinned_before
            + (0 if streamed is None else streamed.host_bytes),
            "loss": steps[-1]["loss"],
        }

    def _model(self, loading: Mapping[str, Any]) -> tuple[LoadedModel, Link, int]:
        key = tuple(loading.items())
        if key not in self._models:
            before_bytes = self._allocated_bytes()
            run = replace(self._base, levers=loading)
            loaded = load(run, self._device)
            link = Link(run.config(self._device.type), loaded)
            self._models[key] = (loaded, link, self._allocated_bytes() - before_bytes)
        return self._models[key]

    def _allocated_bytes(self) -> int:
        gc.collect()
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0


def measure_model(base: LeverRun, device: torch.device, num_rounds: int, num_steps: int, write: Any) -> None:
    """Measure all levers on `base`, and hand the rows so far to `write` after each round."""
    bench = Bench(base, device)
    levers = levers_of(bench.num_layers)
    visits: dict[str, list[dict[str, Any]]] = {priced.name: [] for priced in levers}
    for _ in range(num_rounds):
        for priced in levers:
            visits[priced.name].append(bench.visit(priced, num_steps))
            print(base.model, priced.name, visits[priced.name][-1], flush=True)
        write(rows_of(base, levers, visits))


def rows_of(
    base: LeverRun, levers: tuple[Priced, ...], visits: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """A row for each lever: the difference to the run that it is set against."""

    def step_s(name: str) -> float:
        return median(seconds for visit in visits[name] for seconds in visit["times_s"])

    def allocated_bytes(name: str) -> int:
        return max(visit["allocated_bytes"] for visit in visits[name])

    return [
        {
            "model": base.model,
            "tokens": base.tokens,
            "lever": priced.name,
            "without": priced.without,
            "allocated_bytes": allocated_bytes(priced.name),
            "step_s": step_s(priced.name),
            "saves_bytes": None
            if priced.without is None
            else allocated_bytes(priced.without) - allocated_bytes(priced.name),
            "costs_s": None if priced.without is None else step_s(priced.name) - step_s(priced.without),
            "moved_bytes": visits[priced.name][-1]["moved_bytes"],
            "pinned_bytes": max(visit["pinned_bytes"] for visit in visits[priced.name]),
            "times_s": [visit["times_s"] for visit in visits[priced.name]],
        }
        for priced in levers
    ]


def main() -> None:
    """Measure the chosen models, and write the record after each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    prefer_expandable_segments()
    before = json.loads(arguments.out.read_text())["figures"]["levers"] if arguments.out.exists() else []
    for base in MODELS:
        if arguments.model and base.model not in arguments.model:
            continue
        kept = [row for row in before if row["model"] != base.model]

        def write(rows: list[dict[str, Any]], kept: list[dict[str, Any]] = kept) -> None:
            conditions = {"tokens": TOKENS, "rank": 16, "num_steps": arguments.steps, "num_rounds": arguments.rounds}
            write_record(arguments.out, name="lever_prices", figures={"levers": [*kept, *rows]}, conditions=conditions)

        measure_model(base, torch.device("cuda"), arguments.rounds, arguments.steps, write)
        before = json.loads(arguments.out.read_text())["figures"]["levers"]
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
