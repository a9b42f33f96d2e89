"""Whether a run fits a card, and where its memory goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eightgig.config import MixedPrecision
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.models.precision import DTYPES, Precision
from eightgig.plan.allocator import AllocatorResult, AllocatorSettings, replay
from eightgig.plan.simulate import Simulation, simulate
from eightgig.plan.workload import Workload, largest_workload

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.registry.gpus import GpuFacts

AMPERE = (8, 6)  # what a card is taken for of which only the memory is known


@dataclass(frozen=True)
class PlannedPeak:
    """The highest point of a run.

    Attributes:
        allocated_bytes: torch.cuda.max_memory_allocated.
        reserved_bytes: torch.cuda.max_memory_reserved.
        device_bytes: what the driver counts for the process: reserved, and the CUDA context.
        moment: the phase in which the most is allocated.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    moment: str


@dataclass(frozen=True)
class Lever:
    """A setting that was changed to fit."""

    name: str
    saves_bytes: int
    costs_s: float
    reason: str


@dataclass(frozen=True)
class PlannedTime:
    """How long a step takes."""

    step_s: float
    epoch_s: float | None
    tokens_per_s: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """What a run takes and whether it fits.

    Attributes:
        gpu: the card's name, None where none is given.
        budget_bytes: the card's memory less what is kept free, None without a card.
        fits: None without a card.
        breakdown: bytes of each category at the peak; they add up to `peak.device_bytes`.
        phases: peak device bytes of loading, training and validation.
        workload: tokens, image tokens among them, of one planned micro-batch, and its samples.
        config: the settings that were planned.
    """

    model: str
    method: str
    gpu: str | None
    budget_bytes: int | None
    fits: bool | None
    peak: PlannedPeak
    breakdown: Mapping[str, int]
    phases: Mapping[str, int]
    workload: Mapping[str, int]
    config: Mapping[str, Any]
    levers: tuple[Lever, ...] = ()
    time: PlannedTime | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        return asdict(self)


def plan(
    config: TrainingConfig,
    spec: ModelSpec,
    gpu: GpuFacts | None,
    *,
    reserve_bytes: int,
    workload: Workload | None = None,
) -> Plan:
    """The plan of `config` on `gpu` for the largest samples that its settings let through.

    Needs no GPU and no weights. A run that goes beyond the budget is tried once more as PyTorch would try: near the
    limit it gives back what it holds unused.

    Args:
        config: the run's settings.
        spec: its model.
        gpu: the card; None plans without a limit.
        reserve_bytes: of the card's memory, kept free for its other users.
        workload: what is planned; None: largest_workload(config, spec).

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel, EnvironmentProblem: the model's processor can't be had.
    """
    work = workload or largest_workload(config, spec)
    capability = gpu.compute_capability if gpu is not None and gpu.compute_capability is not None else AMPERE
    simulation = simulate(config, spec, work, planned_precision(config, gpu), capability)
    result = replay(simulation.trace, AllocatorSettings())
    budget_bytes, fits = None, None
    if gpu is not None:
        budget_bytes = gpu.vram_bytes - reserve_bytes
        fits = result.peak_reserved_bytes + CONTEXT_BYTES <= budget_bytes
        if not fits and budget_bytes > CONTEXT_BYTES:
            limited = replay(simulation.trace, AllocatorSettings(limit_bytes=budget_bytes - CONTEXT_BYTES))
            fits = limited.out_of_memory is None
            result = limited if fits else result
    return Plan(
        model=spec.name,
        method=config.training.method.value,
        gpu=None if gpu is None else gpu.name,
        budget_bytes=budget_bytes,
        fits=fits,
        peak=_peak(result),
        breakdown=_breakdown(simulation, result),
        phases=_phases(result),
        workload=_sizes(work),
        config=config.model_dump(mode="json"),
    )


def planned_precision(config: TrainingConfig, gpu: GpuFacts | None) -> Precision:
    """The precision that a run of `config` has on `gpu`: fp16 where bf16 is asked for and the card has none."""
    wanted = config.hardware.mixed_precision
    if wanted is MixedPrecision.BF16 and gpu is not None and gpu.has_bf16 is False:
        wanted = MixedPrecision.FP16
    return Precision(compute_dtype=DTYPES[wanted], mixed_precision=wanted, note=None)


def _peak(result: AllocatorResult) -> PlannedPeak:
    highest = max(result.phases, key=lambda phase: phase.allocated_bytes)
    return PlannedPeak(
        allocated_bytes=result.peak_allocated_bytes,
        reserved_bytes=result.peak_reserved_bytes,
        device_bytes=result.peak_reserved_bytes + CONTEXT_BYTES,
        moment=highest.name,
    )


def _phases(result: AllocatorResult) -> dict[str, int]:
    phases: dict[str, int] = {}
    for phase in result.phases:
        phases[phase.name] = max(phases.get(phase.name, 0), phase.reserved_bytes + CONTEXT_BYTES)
    return phases


def _breakdown(simulation: Simulation, result: AllocatorResult) -> dict[str, int]:
    held = {
        "4-bit weights": simulation.weights_4bit_bytes,
        "16-bit weights": simulation.weights_16bit_bytes,
        "adapters": simulation.adapters_bytes,
        "gradients": simulation.gradients_bytes,
        "optimizer": simulation.optimizer_bytes,
    }
    return {
        **held,
        "activations and temporary": result.peak_allocated_bytes - sum(held.values()),
        "allocator overhead": result.peak_reserved_bytes - result.peak_allocated_bytes,
        "CUDA context": CONTEXT_BYTES,
    }


def _sizes(work: Workload) -> dict[str, int]:
    return {"num_samples": len(work.samples), "num_tokens": work.batch.num_tokens}
