"""What the benchmarks of the memory levers share: a run with its levers, its plan, and its steps on the card.

One row of `tokens` tokens, one of its pictures among them, random words behind it; labels on all words of the answer.
The batch is the same in each step, as in `peer_step.py`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from eightgig import registry
from eightgig.config import HardwareConfig, TrainingConfig
from eightgig.config.layers import nested
from eightgig.config.levers import Levers
from eightgig.core.errors import DoesNotFit
from eightgig.data.batch import IGNORE_INDEX, MicroBatch
from eightgig.memory.cached_tower import PIXELS, FedModel, tower_features, tower_of
from eightgig.memory.cap import limit_allocator
from eightgig.memory.device_use import device_use
from eightgig.memory.host_copies import HostCopy, Transfers, transfers_of
from eightgig.models.adapters import attach_adapters
from eightgig.models.host_weights import host_tables
from eightgig.models.load import LoadedModel, load_model
from eightgig.models.precision import choose_precision
from eightgig.plan.candidates import Candidates
from eightgig.plan.op_costs import BESIDE, PREFETCH
from eightgig.plan.plan import card_rates, time_of
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec
from eightgig.registry.gpus import get_gpu
from eightgig.step.build import (
    build_compute,
    build_step,
    checkpoint_as_configured,
    fuse_lora_as_configured,
    offload_as_configured,
    tile_as_configured,
)
from eightgig.step.step import Compute, TrainingStep

MEASURED_CARD, SMALL_CARD = "H100 SXM", "RTX 4060"
SMALL_LINK_BYTES_PER_S = 7.8e9  # issue 5: what PCIe 4.0 x8, which that card has, was measured to carry
RANK = 16
NUM_WARM_UP = 3  # steps whose times are left out, as `peer_step.py` does
FIRST_WORD, PAST_LAST_WORD = 1000, 30000  # ids that `peer_step.py` draws from


@dataclass(frozen=True)
class LeverRun:
    """Steps of one model with some levers.

    Attributes:
        model: a registry's name, or a folder.
        tokens: of the row, those of its picture among them.
        levers: settings of the sections hardware and training, by their last names.
        image_px: side of the picture; None: as large as the model takes it.
    """

    name: str
    model: str
    tokens: int
    levers: Mapping[str, Any] = field(default_factory=dict)
    cap_gib: float | None = None
    num_steps: int = 10
    image_px: int | None = None
    precision: str = "bf16"

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return registry.resolve(self.model)

    def config(self, device_type: str) -> TrainingConfig:
        """The settings on a device of that type; a cap and a GPU's optimizers only on a GPU."""
        spec = self.spec
        side_px = self.image_px or spec.facts.image_px
        num_image_tokens = spec.family.num_image_tokens(spec.facts, self.image_px, width_px=side_px, height_px=side_px)
        on_gpu = device_type == "cuda"
        values: dict[str, Any] = {
            "model.name": self.model,
            "model.random_weights_seed": 0,
            "data.max_length": self.tokens - num_image_tokens,
            "data.image_size": self.image_px,
            "training.batch_size": 1,
            "training.gradient_accumulation_steps": 1,
            "training.lora.rank": RANK,
            "training.lora.alpha": 2 * RANK,
            "training.optimizer": "adamw_8bit",
            "hardware.device": device_type,
            "hardware.mixed_precision": self.precision,
            "hardware.cap_gib": self.cap_gib if on_gpu else None,
            # No lever is left to the run's own plan: what is measured is what was asked for.
            **{setting_path(name): value for name, value in (asdict(Levers()) | dict(self.levers)).items()},
        }
        if not on_gpu:
            values["training.optimizer"] = "adamw"
        return TrainingConfig.model_validate(nested(values))


def setting_path(name: str) -> str:
    """The dotted path of a setting of the sections hardware and training."""
    return f"{'hardware' if name in HardwareConfig.model_fields else 'training'}.{name}"


class Planner:
    """Plans runs; those that share their model and their row share its simulation."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Candidates] = {}

    def plan(self, run: LeverRun) -> dict[str, Any]:
        """What `run` is planned to take on the card where it is measured, and its step there and on the small one."""
        card = get_gpu(MEASURED_CARD)
        key = (run.model, run.tokens, run.image_px, run.precision)
        if key not in self._known:
            plain = replace(run, levers={}, cap_gib=None)
            self._known[key] = Candidates(
                plain.config("cuda"), run.spec, card, card.vram_bytes, self._workload_of(run.spec), card_rates(card)
            )
        found = self._known[key].get({setting_path(name): value for name, value in run.levers.items()})
        assert found is not None, f"{run.name}: its levers contradict each other or the model"
        assert found.work.batch.num_tokens == run.tokens, f"{run.name}: {found.work.batch.num_tokens} tokens"
        costs, rates = found.simulation.micro_batch_costs, card_rates(get_gpu(SMALL_CARD))
        assert rates is not None
        small = replace(rates, transfer_bytes_per_s=SMALL_LINK_BYTES_PER_S)
        moved = {
            kind: round(sum(count * cost.moved_bytes for cost, count in costs.items() if cost.kind == kind))
            for kind in (BESIDE, PREFETCH)
        }
        on_small = time_of(found.simulation, found.config, found.work, small)
        assert on_small is not None
        assert found.time is not None
        return {
            "name": run.name,
            "model": run.model,
            "tokens": run.tokens,
            "cap_gib": run.cap_gib,
            "levers": dict(run.levers),
            "allocated_bytes": found.result.peak_allocated_bytes,
            "reserved_bytes": found.result.peak_reserved_bytes,
            "device_bytes": found.device_bytes,
            "phases_reserved_bytes": {phase.name: phase.reserved_bytes for phase in found.result.phases},
            "host_weights_bytes": found.simulation.host_bytes,
            "offloaded_bytes": moved[BESIDE] // 2,
            "moved_bytes": sum(moved.values()),
            "step_s": found.time.step_s,
            "step_on_small_card_s": on_small.step_s,
            "moving_on_small_card_s": sum(moved.values()) / small.transfer_bytes_per_s,
        }

    @staticmethod
    def _workload_of(spec: ModelSpec) -> Any:
        return lambda config: largest_workload(config, spec)


class CountedTransfers(Transfers):
    """Another's copies to the host and back, their bytes counted."""

    def __init__(self, inner: Transfers) -> None:
        super().__init__()
        self._inner = inner
        self.host = inner.host
        self.moved_bytes = 0

    def send(self, tensor: torch.Tensor) -> HostCopy:
        """See `Transfers`."""
        copy = self._inner.send(tensor)
        self.moved_bytes += copy.num_bytes
        return copy

    def wait_until_sent(self, copy: HostCopy) -> None:
        """See `Transfers`."""
        self._inner.wait_until_sent(copy)

    def fetch(self, copy: HostCopy) -> torch.Tensor:
        """See `Transfers`."""
        self.moved_bytes += copy.num_bytes
        return self._inner.fetch(copy)

    def wait_until_fetched(self, copy: HostCopy) -> None:
        """See `Transfers`."""
        self._inner.wait_until_fetched(copy)


class Link:
    """Counts what crosses PCIe: layer inputs, streamed weights, rows of embeddings with their ids, and the batch."""

    def __init__(self, config: TrainingConfig, loaded: LoadedModel) -> None:
        self.transfers = CountedTransfers(transfers_of(loaded.device))
        self._loaded = loaded
        self._rows_bytes = 0
        for table in host_tables(config.hardware, loaded.spec, loaded.model):
            table.register_forward_hook(self._count_rows)

    @property
    def moved_bytes(self) -> int:
        """Since the model was loaded."""
        streamed = self._loaded.streamed
        return self.transfers.moved_bytes + self._rows_bytes + (0 if streamed is None else streamed.moved_bytes)

    @property
    def pinned_bytes(self) -> int:
        """Host memory taken for streamed weights and layer inputs; the table of embeddings is not pinned."""
        streamed = self._loaded.streamed
        return self.transfers.host.num_bytes + (0 if streamed is None else streamed.host_bytes)

    def _count_rows(self, module: nn.Module, arguments: Any, rows: torch.Tensor) -> None:
        self._rows_bytes += rows.nbytes + arguments[0].nbytes


class Watch:
    """What the device shows as used beyond the context that a process has after its first matrix product."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            square = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
            (square @ square).sum().item()
            del square
        self.context_bytes = self._beside_pytorch()
        self.peaks: dict[str, dict[str, int]] = {}
        self._most_beside_bytes = self.context_bytes

    def begin(self) -> None:
        """Count the peaks of a phase from here on."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def look(self) -> None:
        """Take in what else lies on the device now: managed memory, other allocators, kernels that were loaded."""
        self._most_beside_bytes = max(self._most_beside_bytes, self._beside_pytorch())

    def end(self, phase: str) -> None:
        """Note the peaks since `begin`."""
        self.look()
        if self.is_cuda:
            self.peaks[phase] = {
                "allocated_bytes": torch.cuda.max_memory_allocated(self._device),
                "reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            }

    def figures(self) -> dict[str, Any]:
        """Peaks by phase, and `counted_bytes`: the most that the device can have shown at one time less the context."""
        if not self.is_cuda:
            return {"phases": {}}
        reserved_bytes = max(peak["reserved_bytes"] for peak in self.peaks.values())
        return {
            "phases": self.peaks,
            "allocated_bytes": max(peak["allocated_bytes"] for peak in self.peaks.values()),
            "reserved_bytes": reserved_bytes,
            "context_bytes": self.context_bytes,
            "counted_bytes": reserved_bytes + self._most_beside_bytes - self.context_bytes,
            "device_bytes": reserved_bytes + self._most_beside_bytes,
            "counts_other_programs": device_use(self._device).counts_other_programs,
            "num_alloc_retries": torch.cuda.memory_stats(self._device)["num_alloc_retries"],
        }

    def _beside_pytorch(self) -> int:
        if not self.is_cuda:
            return 0
        return device_use(self._device).used_bytes - torch.cuda.memory_reserved(self._device)


@dataclass
class Prepared:
    """A model with its levers, ready for steps on `batch`."""

    loaded: LoadedModel
    link: Link
    compute: Compute
    step: TrainingStep
    batch: MicroBatch


def load(run: LeverRun, device: torch.device) -> LoadedModel:
    """The model of `run` with its adapters, as the trainer loads it."""
    config = run.config(device.type)
    precision = choose_precision(config.hardware.mixed_precision, device)
    tower_on_host = config.hardware.cache_image_features
    loaded = load_model(config, run.spec, device, precision, tower_on_host=tower_on_host)
    attach_adapters(loaded, config)
    return loaded


def random_batch(run: LeverRun, loaded: LoadedModel, *, seed: int = 1) -> MicroBatch:
    """The row of `run` on the host: random pixels, and random words where it has labels."""
    batch = largest_workload(run.config(loaded.device.type), run.spec).batch
    generator = torch.Generator().manual_seed(seed)
    num_words = loaded.model.config.get_text_config().vocab_size
    words = torch.randint(
        min(FIRST_WORD, num_words // 2), min(PAST_LAST_WORD, num_words), batch.labels.shape, generator=generator
    )
    is_target = batch.labels != IGNORE_INDEX
    inputs = dict(batch.model_inputs)
    inputs["input_ids"] = torch.where(is_target, words, inputs["input_ids"])
    inputs[PIXELS] = torch.randn(inputs[PIXELS].shape, generator=generator)
    changed = replace(batch, model_inputs=inputs, labels=torch.where(is_target, words, batch.labels))
    return changed.pin_memory() if loaded.device.type == "cuda" else changed


def fed_batch(loaded: LoadedModel, compute: Compute, batch: MicroBatch) -> tuple[FedModel, MicroBatch]:
    """The model with its tower off the card, to which it comes for this, and the batch with features, not pixels."""
    tower_of(loaded.model, loaded.spec.family).to(compute.device)
    inputs = batch.to(compute.device, compute.input_dtype).model_inputs
    with compute.autocast():
        features = tower_features(loaded.model, loaded.spec.family, inputs).cpu()
    fed = FedModel(loaded.model, loaded.spec.family)
    fed.tower.to("cpu")
    del inputs
    if compute.device.type == "cuda":
        torch.cuda.empty_cache()
        features = features.pin_memory()
    return fed, replace(batch, model_inputs={**batch.model_inputs, PIXELS: features})


def prepare(run: LeverRun, loaded: LoadedModel, batch: MicroBatch, link: Link | None = None) -> Prepared:
    """The levers of `run` on a model that was loaded for it, and the step; `batch` has what the model takes."""
    config, spec = run.config(loaded.device.type), loaded.spec
    link = Link(config, loaded) if link is None else link
    fuse_lora_as_configured(config, spec, loaded.model)
    tile_as_configured(config, spec, loaded.model)
    checkpoint_as_configured(config, spec, loaded.model)
    offload_as_configured(config, spec, loaded.model, link.transfers)
    compute = build_compute(config, loaded.device, loaded.precision)
    step = build_step(config, spec, loaded.model, compute, num_steps=run.num_steps)
    return Prepared(loaded, link, compute, step, batch)


def without_levers(loaded: LoadedModel) -> None:
    """Undo what `prepare` did to the model."""
    for layer in loaded.spec.family.decoder_layers(loaded.model):
        adapted = (module for module in layer.modules() if isinstance(module, LoraLayer))
        for module in (layer, loaded.spec.family.mlp(layer), *loaded.spec.family.projections(layer), *adapted):
            if module is not None:
                vars(module).pop("forward", None)
    loaded.model.zero_grad(set_to_none=True)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_step(prepared: Prepared) -> dict[str, Any]:
    """One optimizer step: its seconds, its loss, and the bytes that crossed the link for it."""
    device, link, batch = prepared.loaded.device, prepared.link, prepared.batch
    moved_before = link.moved_bytes
    synchronize(device)
    started = time.perf_counter()
    result = prepared.step([batch], batch.num_target_tokens)
    is_applied = prepared.step.apply(prepared.step.finish_gradients())
    synchronize(device)
    seconds = time.perf_counter() - started
    assert is_applied, "a gradient that is not finite"
    batch_bytes = sum(tensor.nbytes for tensor in batch.model_inputs.values()) + batch.labels.nbytes
    return {
        "step_s": seconds,
        "loss": float(result.loss),
        "moved_bytes": link.moved_bytes - moved_before + batch_bytes,
    }


def measure(run: LeverRun, device: torch.device) -> dict[str, Any]:
    """The row of `run`, in a process of its own; `out_of_memory` in it where it did not fit."""
    watch = Watch(device)
    config = run.config(device.type)
    limit_allocator(device, config.hardware.cap_gib)
    row: dict[str, Any] = {"name": run.name, "losses": []}
    steps: list[dict[str, Any]] = []
    try:
        watch.begin()
        started = time.perf_counter()
        loaded = load(run, device)
        row["load_s"] = time.perf_counter() - started
        watch.end("load")
        batch = random_batch(run, loaded)
        if config.hardware.levers.cache_image_features:
            watch.begin()
            compute = build_compute(config, device, loaded.precision)
            _, batch = fed_batch(loaded, compute, batch)
            watch.end("features")
        prepared = prepare(run, loaded, batch)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        watch.begin()
        for _ in range(run.num_steps):
            steps.append(take_step(prepared))
            watch.look()
        watch.end("train")
    except (torch.OutOfMemoryError, DoesNotFit) as error:
        return row | {"out_of_memory": True, "num_steps": len(steps), "error": str(error)[:500]}
    timed = [step["step_s"] for step in steps[NUM_WARM_UP:] or steps]
    row["losses"] = [step["loss"] for step in steps]
    return row | {
        "out_of_memory": False,
        "num_steps": len(steps),
        "num_tokens": batch.num_tokens,
        "num_target_tokens": batch.num_target_tokens,
        "step_s": median(timed),
        "steps_s": [step["step_s"] for step in steps],
        "tokens_per_s": batch.num_tokens / median(timed),
        "moved_bytes": steps[-1]["moved_bytes"],
        "pinned_bytes": prepared.link.pinned_bytes,
        **watch.figures(),
    }
