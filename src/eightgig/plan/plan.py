"""Whether a run fits a card, and where its memory goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from eightgig.config import MixedPrecision
from eightgig.config.levers import settled
from eightgig.core.units import GIB
from eightgig.memory.segments import expects_expandable_segments
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.models.precision import DTYPES, Precision
from eightgig.plan import categories
from eightgig.plan.allocator import AllocatorResult, AllocatorSettings, replay
from eightgig.plan.card_rates import CardRates, rates_of
from eightgig.plan.simulate import Simulation, simulate
from eightgig.plan.step_time import PlannedTime, planned_time
from eightgig.plan.workload import Workload, largest_workload, workload_sizes

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
    """A setting that trades memory against time.

    Attributes:
        name: what the setting does, in words.
        saves_bytes: of the card, against the run without it.
        costs_s: of each step, against the run without it; negative where it saves time too. None where times are not
            known.
        reason: why it was chosen.
    """

    name: str
    saves_bytes: int
    costs_s: float | None
    reason: str


@dataclass(frozen=True)
class Alternative:
    """Settings that fit where those asked for don't.

    Attributes:
        settings: path and value of each that differs.
        device_bytes: the peak with them.
        step_s: one optimizer step with them, None where it is not known.
        price: what is given up, in words.
    """

    settings: Mapping[str, Any]
    device_bytes: int
    step_s: float | None
    price: str


@dataclass(frozen=True)
class Plan:
    """What a run takes and whether it fits.

    Attributes:
        gpu: the card's name, None where none is given.
        budget_bytes: the card's memory less what is kept free, None without a card.
        fits: None without a card.
        breakdown: bytes of each category at the peak; they add up to `peak.device_bytes`.
        phases: peak device bytes of loading, validation, training and saving.
        workload: tokens, image tokens among them, of one planned pass, and its samples.
        config: the settings that were planned, with nothing left to a plan.
        levers: settings that save memory, and what each costs.
        alternatives: where the run does not fit: settings that would, the smallest change first.
        time: None where the card's rates are not known.
        host_bytes: of weights that are kept in host memory; what else a process takes there comes on top.
        feature_bytes: on the disk, of the features of a pass's images; 0 where none are kept.
    """

    model: str
    method: str
    gpu: str | None
    budget_bytes: int | None
    fits: bool | None
    peak: PlannedPeak
    breakdown: Mapping[str, int]
    phases: Mapping[str, int]
    workload: Mapping[str, Any]
    config: Mapping[str, Any]
    levers: tuple[Lever, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    time: PlannedTime | None = None
    host_bytes: int = 0
    feature_bytes: int = 0

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
    rates: CardRates | None = None,
) -> Plan:
    """The plan of `config` on `gpu`; levers that it leaves to the plan are off.

    Needs no GPU and no weights.

    Args:
        config: the run's settings.
        spec: its model.
        gpu: the card; None plans without a limit.
        reserve_bytes: of the card's memory, kept free for its other users.
        workload: what each pass holds; None: the largest samples that the settings let through.
        rates: of the card, where it was measured; None: estimated from its data sheet.

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel: the model can't be planned.
        UnsupportedModel, EnvironmentProblem: the model's processor can't be had.
    """
    work = workload if workload is not None else largest_workload(config, spec)
    simulation = simulate(config, spec, work, planned_precision(config, gpu), capability_of(gpu))
    budget_bytes = None if gpu is None else gpu.vram_bytes - reserve_bytes
    result, fits = place(simulation, config, gpu, budget_bytes)
    time = time_of(simulation, config, work, rates or card_rates(gpu))
    return told(config, spec, gpu, budget_bytes, Placed(work, simulation, result, fits, time))


@dataclass(frozen=True)
class Placed:
    """A run that was simulated and held against a card.

    Attributes:
        fits: None without a limit.
        time: None where the card's rates are not known.
    """

    work: Workload
    simulation: Simulation
    result: AllocatorResult
    fits: bool | None
    time: PlannedTime | None


def told(
    config: TrainingConfig, spec: ModelSpec, gpu: GpuFacts | None, budget_bytes: int | None, placed: Placed
) -> Plan:
    """The plan of `config`, whose run with validation is `placed`."""
    return Plan(
        model=spec.name,
        method=config.training.method.value,
        gpu=None if gpu is None else gpu.name,
        budget_bytes=budget_bytes,
        fits=placed.fits,
        peak=_peak(placed.result),
        breakdown=_breakdown(placed.simulation, placed.result),
        phases=_phases(placed.result),
        workload=workload_sizes(placed.work),
        config=settled(config).model_dump(mode="json"),
        time=placed.time,
        host_bytes=placed.simulation.host_bytes,
        feature_bytes=placed.simulation.feature_bytes,
    )


def card_rates(gpu: GpuFacts | None) -> CardRates | None:
    """The rates that `gpu` is taken to have, None where they are not known."""
    return None if gpu is None else rates_of(gpu)


def time_of(
    simulation: Simulation, config: TrainingConfig, work: Workload, rates: CardRates | None
) -> PlannedTime | None:
    """How long the simulated run takes, its passes being those of `work`; None without `rates`."""
    if rates is None:
        return None
    return planned_time(
        simulation.micro_batch_costs,
        simulation.update_costs,
        rates,
        num_micro_batches=work.num_micro_batches or config.passes_per_step,
        num_tokens=work.batch.num_tokens,
    )


def allocator_settings() -> AllocatorSettings:
    """The allocator that a run started here has, without a limit: `place` judges by what it would reserve."""
    return AllocatorSettings(expandable_segments=expects_expandable_segments())


def capability_of(gpu: GpuFacts | None) -> tuple[int, int]:
    """The compute capability that `gpu` is planned with."""
    return gpu.compute_capability if gpu is not None and gpu.compute_capability is not None else AMPERE


def place(
    simulation: Simulation, config: TrainingConfig, gpu: GpuFacts | None, budget_bytes: int | None
) -> tuple[AllocatorResult, bool | None]:
    """What the allocator makes of the run, and whether it stays below the card's budget and the config's cap.

    A run fits whose reserved memory stays below of itself. Near a limit PyTorch gives back what it holds unused, and a
    run may pass that this says does not fit; on an H100 some that only that would have saved ran out of memory
    (docs/decisions/0005-planner.md). Without either limit the second is None.
    """
    result = replay(simulation.trace, allocator_settings())
    limit_bytes = reserved_limit_bytes(config, budget_bytes)
    return result, None if limit_bytes is None else result.peak_reserved_bytes <= limit_bytes


def reserved_limit_bytes(config: TrainingConfig, budget_bytes: int | None) -> int | None:
    """What PyTorch may reserve in a run: the smaller of its cap and the card's budget, None without both."""
    limits_bytes = [] if config.hardware.cap_gib is None else [round(config.hardware.cap_gib * GIB)]
    if budget_bytes is not None:
        limits_bytes.append(budget_bytes - CONTEXT_BYTES)
    return min(limits_bytes, default=None)


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
    at_peak = simulation.trace.categories_at_peak()
    held = {category: at_peak.get(category, 0) for category in categories.ORDER}
    # Blocks that the allocator left larger than asked for are overhead, as is what it holds unused.
    return {
        **held,
        categories.OVERHEAD: result.peak_reserved_bytes - sum(held.values()),
        categories.CONTEXT: CONTEXT_BYTES,
    }
