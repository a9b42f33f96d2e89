"""The table of cards and models: which texts QLoRA can train where, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from eightgig.config import ConfigPresets
from eightgig.core.logging import get_logger
from eightgig.core.units import GIB, format_bytes
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.allocator import replay
from eightgig.plan.card_rates import rates_of
from eightgig.plan.cuda_rules import HOPPER
from eightgig.plan.plan import AMPERE, allocator_settings, planned_precision, time_of
from eightgig.plan.search import longest_fit
from eightgig.plan.simulate import Simulator
from eightgig.plan.workload import largest_workload
from eightgig.registry import ModelSpec, all_specs
from eightgig.registry.gpus import RESERVE_GIB, GpuFacts, all_gpus, get_gpu
from eightgig.train.planning import UNPLANNABLE, reason

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig

LADDER_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
COMMON_TOKENS = 512  # the length at which speeds are compared: that of the preset
REFERENCE_GPU = "A100 80GB SXM"

logger = get_logger(__name__)


class SimulatedRun(Protocol):
    """What a simulated run takes, whichever card it is held against."""

    @property
    def device_bytes(self) -> int:
        """Peak on a card without a limit, the CUDA context among it."""

    def fits(self, budget_bytes: int) -> bool:
        """Whether it ends on a card that has `budget_bytes` for it."""


Simulate = Callable[["TrainingConfig", ModelSpec, GpuFacts], SimulatedRun]
"""Simulates a run on a card; its memory plays no part, so that the result serves all cards of its class."""

Speed = Callable[["TrainingConfig", ModelSpec, Sequence[GpuFacts]], Mapping[str, float]]
"""Tokens per second of a run on each of the cards, by the card's name; cards without known rates are left out."""


@dataclass(frozen=True)
class MatrixGpu:
    """A card of the table; `budget_bytes` is its memory less what is kept free."""

    name: str
    vram_gb: int | None
    vram_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class MatrixModel:
    """A model of the table; `longest_tokens` is the longest length of the ladder that its positions hold."""

    name: str
    num_parameters: int
    longest_tokens: int


@dataclass(frozen=True)
class Cell:
    """One model on one card.

    Attributes:
        max_length_tokens: the longest `data.max_length` of the ladder that fits, None where not even the first does.
        device_bytes: the planned peak at that length, or at the first where that does not fit.
        tokens_per_s: at `Matrix.common_tokens`; None where that does not fit or the time is not known.
        relative_speed: in multiples of the reference card's.
    """

    model: str
    gpu: str
    max_length_tokens: int | None
    device_bytes: int
    tokens_per_s: float | None
    relative_speed: float | None


@dataclass(frozen=True)
class LeftOut:
    """A model that can't be planned, and why."""

    model: str
    reason: str


@dataclass(frozen=True)
class Matrix:
    """The table: a cell for each of `models` on each of `gpus`, by model, then by card."""

    preset: str
    method: str
    reserve_bytes: int
    ladder_tokens: tuple[int, ...]
    common_tokens: int
    reference_gpu: str
    gpus: tuple[MatrixGpu, ...]
    models: tuple[MatrixModel, ...]
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        """The table as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ReplayedRun:
    """A simulated run, judged as `plan` judges it; `device_bytes`: its peak, the CUDA context among it."""

    device_bytes: int

    def fits(self, budget_bytes: int) -> bool:
        """Whether the run stays within `budget_bytes`."""
        return self.device_bytes <= budget_bytes


class SharedModel:
    """Simulates runs on cards; all of one model and one class of cards share a fake model, until another one is asked
    for.
    """

    def __init__(self) -> None:
        self._model: str | None = None
        self._simulators: dict[tuple[bool, bool], Simulator] = {}

    def __call__(self, config: TrainingConfig, spec: ModelSpec, gpu: GpuFacts) -> ReplayedRun:
        """The largest samples that `config` lets through, simulated on a card like `gpu` but for its memory."""
        if spec.name != self._model:
            self._model, self._simulators = spec.name, {}
        work, kind = largest_workload(config, spec), card_class(gpu)
        if kind not in self._simulators:
            capability = gpu.compute_capability or AMPERE
            self._simulators[kind] = Simulator(config, spec, work.processor, planned_precision(config, gpu), capability)
        trace = self._simulators[kind].run(config, work).trace
        return ReplayedRun(replay(trace, allocator_settings()).peak_reserved_bytes + CONTEXT_BYTES)


def planned_speeds(config: TrainingConfig, spec: ModelSpec, gpus: Sequence[GpuFacts]) -> dict[str, float]:
    """Tokens per second of `config` on each of `gpus` whose rates are known; one simulation serves all."""
    rates = {gpu.name: found for gpu in gpus if (found := rates_of(gpu)) is not None}
    if not rates:
        return {}
    work = largest_workload(config, spec)
    simulator = Simulator(config, spec, work.processor, planned_precision(config, None), AMPERE)
    simulation = simulator.run(config, work, validates=False)
    times = {name: time_of(simulation, config, work, found) for name, found in rates.items()}
    return {name: time.tokens_per_s for name, time in times.items() if time is not None}


def matrix(
    specs: Sequence[ModelSpec] | None = None,
    gpus: Sequence[GpuFacts] | None = None,
    *,
    reserve_gib: float = RESERVE_GIB,
    simulate_on: Simulate | None = None,
    speed: Speed = planned_speeds,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Matrix:
    """The longest texts that preset ultra_low_memory (QLoRA) trains, for each model on each card.

    Bound of the time: cards fall into classes that take the same memory (Hopper and later or not, bf16 or not: three
    in the table), and one simulation at a length serves all cards of a class. A card's longest length is found by
    bisection, so that there are at most as many simulations of a model as classes times lengths of the ladder (18),
    mostly half of them; a length that no card asks for is never simulated. `benchmarks/results/card_table.json` says
    how long the whole table took; `on_progress` tells of each simulation.

    Args:
        specs: the models; None = all that are known by name.
        gpus: the cards; None = all of the table.
        reserve_gib: of each card's memory, kept free for its other users.
        simulate_on: makes the simulations; None = `SharedModel`.
        speed: tells the speeds.
        on_progress: is told each simulation as it ends, and each model that is left out.
    """
    cards = tuple(all_gpus() if gpus is None else gpus)
    reserve_bytes = round(reserve_gib * GIB)
    models: list[MatrixModel] = []
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for spec in all_specs() if specs is None else specs:
        row = _Row(spec, simulate_on or SharedModel(), on_progress)
        try:
            found = row.cells(cards, reserve_bytes, speed)
        except UNPLANNABLE as error:
            logger.debug("%s can't be planned", spec.name, exc_info=True)
            left_out.append(LeftOut(spec.name, reason(error)))
            on_progress(f"{spec.name} is left out: {reason(error)}")
            continue
        models.append(MatrixModel(spec.name, spec.facts.num_parameters, row.lengths_tokens[-1]))
        cells += found
    return Matrix(
        preset="ultra_low_memory",
        method=ConfigPresets.ultra_low_memory().training.method.value,
        reserve_bytes=reserve_bytes,
        ladder_tokens=LADDER_TOKENS,
        common_tokens=COMMON_TOKENS,
        reference_gpu=REFERENCE_GPU,
        gpus=tuple(MatrixGpu(c.name, c.vram_gb, c.vram_bytes, c.vram_bytes - reserve_bytes) for c in cards),
        models=tuple(models),
        cells=tuple(cells),
        left_out=tuple(left_out),
    )


def lengths_of(spec: ModelSpec) -> tuple[int, ...]:
    """The lengths of the ladder whose texts and one image the model's positions hold; the first one in any case."""
    positions = getattr(spec.family.build_config(spec.facts).get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return LADDER_TOKENS
    side_px = ConfigPresets.ultra_low_memory().data.image_size or spec.facts.image_px
    image_tokens = spec.family.num_image_tokens(spec.facts, side_px, width_px=side_px, height_px=side_px)
    return tuple(length for length in LADDER_TOKENS if length == LADDER_TOKENS[0] or length + image_tokens <= positions)


def card_class(gpu: GpuFacts) -> tuple[bool, bool]:
    """What decides how much memory a run takes on `gpu`: the workspaces of its kernels, and the number format."""
    return (gpu.compute_capability or AMPERE) >= HOPPER, gpu.has_bf16 is not False


def _config(spec: ModelSpec, max_length_tokens: int) -> TrainingConfig:
    return ConfigPresets.ultra_low_memory(overrides={"model.name": spec.name, "data.max_length": max_length_tokens})


class _Row:
    """One model on all cards, with the simulations made for it so far."""

    def __init__(self, spec: ModelSpec, simulate_on: Simulate, on_progress: Callable[[str], None]) -> None:
        self.lengths_tokens = lengths_of(spec)
        self._spec = spec
        self._simulate_on = simulate_on
        self._on_progress = on_progress
        self._runs: dict[tuple[int, tuple[bool, bool]], SimulatedRun] = {}

    def cells(self, cards: Sequence[GpuFacts], reserve_bytes: int, speed: Speed) -> list[Cell]:
        """The model's cell on each of `cards`."""
        longest = {card.name: self._longest(card, card.vram_bytes - reserve_bytes) for card in cards}
        speeds, reference = self._speeds([c for c in cards if (longest[c.name] or 0) >= COMMON_TOKENS], speed)
        return [
            Cell(
                model=self._spec.name,
                gpu=card.name,
                max_length_tokens=longest[card.name],
                device_bytes=self._run(longest[card.name] or self.lengths_tokens[0], card).device_bytes,
                tokens_per_s=speeds.get(card.name),
                relative_speed=speeds[card.name] / reference if reference and card.name in speeds else None,
            )
            for card in cards
        ]

    def _speeds(self, fitting: Sequence[GpuFacts], speed: Speed) -> tuple[dict[str, float], float | None]:
        """Tokens per second on the cards that fit, as far as known, and on the reference card, whether given or not."""
        reference = get_gpu(REFERENCE_GPU)
        known = speed(_config(self._spec, COMMON_TOKENS), self._spec, tuple({*fitting, reference}))
        return {card.name: known[card.name] for card in fitting if card.name in known}, known.get(reference.name)

    def _longest(self, card: GpuFacts, budget_bytes: int) -> int | None:
        return longest_fit(self.lengths_tokens, lambda length: self._run(length, card).fits(budget_bytes))

    def _run(self, length_tokens: int, card: GpuFacts) -> SimulatedRun:
        kind = card_class(card)
        key = (length_tokens, kind)
        if key not in self._runs:
            run = self._simulate_on(_config(self._spec, length_tokens), self._spec, card)
            self._runs[key] = run
            dtype = "bf16" if kind[1] else "fp16"
            age = "Hopper and later" if kind[0] else "before Hopper"
            self._on_progress(
                f"{self._spec.name}, {length_tokens:,} tokens, cards {age}, {dtype}: {format_bytes(run.device_bytes)}"
            )
        return self._runs[key]
