"""The plan that a run makes of its own memory before the weights are loaded; it chooses the levers left to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from bitsandbytes import functional

from eightgig.config.levers import automatic_paths, settled
from eightgig.core.errors import EightGigError
from eightgig.core.files import write_json
from eightgig.core.logging import get_logger
from eightgig.core.units import GIB, MIB, format_bytes
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.candidates import WorkloadOf
from eightgig.plan.chosen_levers import plan_with_levers
from eightgig.plan.levers import FEATURES
from eightgig.plan.phases import phase_word
from eightgig.plan.wording import trade_words
from eightgig.registry.gpus import RESERVE_GIB, GpuFacts
from eightgig.train.events import TrainingListener
from eightgig.train.image_features import feature_room
from eightgig.train.run_folder import RunFolder

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.data.sets import ReadData
    from eightgig.registry import ModelSpec

FindCard = Callable[[torch.device], GpuFacts | None]
"""Tells the card behind a device; None where there is none, so that nothing is planned."""


class KeptPlan(Protocol):
    """Where the plan of one run may be kept for the next start of an equal one."""

    def get(self) -> dict[str, Any] | None:
        """The plan that was kept, if any."""

    def put(self, planned: dict[str, Any]) -> None:
        """Keep `planned`."""


FindKeptPlan = Callable[["TrainingConfig", GpuFacts, int, "ReadData"], KeptPlan]
"""Tells the place of the plan of a configuration on a card, of whose memory so many bytes stay free, for some data."""


@dataclass(frozen=True)
class PlanDoors:
    """What a run's plan takes from rooms above.

    Attributes:
        find_card: tells the card.
        find_kept: tells where the plan is kept for other runs; None = nowhere.
    """

    find_card: FindCard
    find_kept: FindKeptPlan | None = None


# What a model's own code may raise on tensors without content; a forecast that fails is no reason not to train.
UNPLANNABLE = (EightGigError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)

OTHERS_STEP_BYTES = 256 * MIB  # what other programs have changes by less from minute to minute

logger = get_logger(__name__)


@dataclass(frozen=True)
class PlannedMemory:
    """The planned peak of a run, as memory.json keeps it beside the measured one.

    Attributes:
        allocated_bytes, reserved_bytes: by PyTorch.
        device_bytes: what the driver counts: reserved, and the CUDA context.
        breakdown: bytes of each category at the peak; they add up to `device_bytes`.
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    breakdown: Mapping[str, int]


@dataclass(frozen=True)
class Question:
    """What a run's plan is asked of.

    Attributes:
        config: the run's settings.
        spec: its model.
        card: the graphics card that it computes on.
        others_bytes: what other programs have of it.
        read: its data.
        workload_of: makes the pass that is planned.
        num_image_tokens: counts those of the whole training set.
    """

    config: TrainingConfig
    spec: ModelSpec
    card: GpuFacts
    others_bytes: int
    read: ReadData
    workload_of: WorkloadOf
    num_image_tokens: Callable[[], int]


def plan_run(
    config: TrainingConfig,
    question: Question | None,
    find_kept: FindKeptPlan | None,
    folder: RunFolder,
    listener: TrainingListener,
) -> tuple[TrainingConfig, PlannedMemory | None]:
    """Plan the run's memory, keep the plan in its folder, and say what it says. A resumed run keeps its plan.

    Nothing here stops a run: what can't be planned, and what will not fit, is said.

    Args:
        config: the run's settings.
        question: what is planned, None where there is no card to plan for.
        find_kept: tells where the plan is kept for other runs; None = nowhere.
        folder: the run folder.
        listener: is told.

    Returns:
        `config` with the levers that the plan chose, without any where there is no plan; and the planned memory.
    """
    if question is None:
        return settled(config), None
    planned = _read(folder)
    if planned is None:
        listener.on_message(f"planning the memory on the {question.card.name}")
        try:
            planned = _made(question, find_kept, listener)
        except UNPLANNABLE as error:
            logger.debug("the memory can't be planned", exc_info=True)
            listener.on_message(f"training goes on without a plan of its memory: {reason(error)}")
            return settled(config), None
        write_json(folder.plan, planned)
    for text in _said(planned, config):
        listener.on_message(text)
    return settled(config, planned["config"]["hardware"]), _memory_of(planned)


def _made(question: Question, find_kept: FindKeptPlan | None, listener: TrainingListener) -> dict[str, Any]:
    """The plan, without kept image features where they were left to it and the disk has no room for them."""
    planned = _kept_or_new(question, find_kept)
    if FEATURES not in automatic_paths(question.config) or not planned["feature_bytes"]:
        return planned
    bytes_a_token = planned["feature_bytes"] / planned["workload"]["num_image_tokens"]
    needed_bytes, room_bytes = round(bytes_a_token * question.num_image_tokens()), feature_room(question.config)
    if needed_bytes <= room_bytes:
        return planned
    listener.on_message(
        f"kept image features would suit the card, but take {format_bytes(needed_bytes)} of the disk, which has "
        f"{format_bytes(room_bytes)} for them: planning without"
    )
    hardware = question.config.hardware.model_copy(update={"cache_image_features": False})
    without = question.config.model_copy(update={"hardware": hardware})
    return _kept_or_new(replace(question, config=without), find_kept)


def _kept_or_new(question: Question, find_kept: FindKeptPlan | None) -> dict[str, Any]:
    """The plan, as it was kept from an equal run, or new."""
    config, card, reserve_bytes = question.config, question.card, _reserve_bytes(question)
    place = None if find_kept is None else find_kept(config, card, reserve_bytes, question.read)
    kept = None if place is None else place.get()
    if kept is not None:
        return kept
    with _state_codes_left_alone():
        made = plan_with_levers(
            config, question.spec, card, reserve_bytes=reserve_bytes, workload_of=question.workload_of
        ).to_json()
    if place is not None:
        place.put(made)
    return made


def reason(error: Exception) -> str:
    """Why something could not be planned, in one line."""
    text = error.found if isinstance(error, EightGigError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0]


def _said(planned: Mapping[str, Any], config: TrainingConfig) -> Iterator[str]:
    peak = planned["peak"]
    yield f"planned: {format_bytes(peak['device_bytes'])} on the card at most, in {phase_word(peak['moment'])}"
    for lever in planned["levers"]:
        trade = trade_words(lever["saves_bytes"], lever["costs_s"])
        yield f"chosen for this card: {lever['name']}: {trade}; {lever['reason']}"
    if planned["fits"] is False:
        cap_gib = config.hardware.cap_gib
        limit = f"the {planned['gpu']}" if cap_gib is None else f"hardware.cap_gib = {cap_gib:g}"
        levers = ", with none of the levers that are left to the plan" if automatic_paths(config) else ""
        yield (
            f"this is not expected to fit {limit}, which leaves {format_bytes(planned['budget_bytes'])} with the CUDA "
            f"context{levers}; training is tried all the same. Lower data.max_length, data.image_size or "
            "training.batch_size; `eightgig plan` tries settings without training"
        )


def _reserve_bytes(question: Question) -> int:
    """What of the card this run keeps free: what others have, or may come to have, and what `hardware.cap_gib` forbids.

    What others have is rounded up, so that an equal run some minutes later finds the plan that was kept. The cap leaves
    the CUDA context out.
    """
    others_bytes = -(-question.others_bytes // OTHERS_STEP_BYTES) * OTHERS_STEP_BYTES
    cap_gib = question.config.hardware.cap_gib
    beyond_cap = 0 if cap_gib is None else question.card.vram_bytes - round(cap_gib * GIB) - CONTEXT_BYTES
    return max(round(RESERVE_GIB * GIB), others_bytes, beyond_cap)


def _read(folder: RunFolder) -> dict[str, Any] | None:
    """The plan that the run folder holds; None where there is none that can be used."""
    try:
        planned: dict[str, Any] = json.loads(folder.plan.read_text(encoding="utf-8"))
        _memory_of(planned)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return planned


def _memory_of(planned: Mapping[str, Any]) -> PlannedMemory:
    peak = planned["peak"]
    return PlannedMemory(
        allocated_bytes=peak["allocated_bytes"],
        reserved_bytes=peak["reserved_bytes"],
        device_bytes=peak["device_bytes"],
        breakdown=planned["breakdown"],
    )


@contextlib.contextmanager
def _state_codes_left_alone() -> Iterator[None]:
    """Undo what the simulation puts into bitsandbytes' table of codes.

    A code that lies on the CPU would be copied to the GPU whenever a 4-bit weight of the real run is unpacked.
    """
    before = dict(functional.name2qmap)
    try:
        yield
    finally:
        functional.name2qmap.clear()
        functional.name2qmap.update(before)
