"""The plan that a run makes of its own memory before the weights are loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes import functional

from eightgig.core.errors import EightGigError
from eightgig.core.files import write_json
from eightgig.core.logging import get_logger
from eightgig.core.units import GIB, format_bytes
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.phases import phase_word
from eightgig.plan.plan import plan
from eightgig.plan.workload import Workload
from eightgig.registry.gpus import GpuFacts
from eightgig.train.events import TrainingListener
from eightgig.train.run_folder import RunFolder

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

FindCard = Callable[[torch.device], GpuFacts | None]
"""Tells the card behind a device; None where there is none, so that nothing is planned."""

# What a model's own code may raise on tensors without content; a forecast that fails is no reason not to train.
UNPLANNABLE = (EightGigError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)

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


def plan_memory(
    config: TrainingConfig,
    spec: ModelSpec,
    card: GpuFacts,
    workload: Callable[[], Workload],
    folder: RunFolder,
    listener: TrainingListener,
) -> PlannedMemory | None:
    """Plan the run's memory on `card`, keep the plan in its folder, and say what it says. A resumed run keeps its plan.

    Nothing here stops a run: what can't be planned, and what will not fit, is said.

    Args:
        config: the run's settings.
        spec: its model.
        card: the graphics card that it computes on.
        workload: makes the micro-batch that is planned.
        folder: the run folder.
        listener: is told.
    """
    planned = _read(folder)
    if planned is None:
        listener.on_message(f"planning the memory on the {card.name}")
        try:
            with _state_codes_left_alone():
                made = plan(config, spec, card, reserve_bytes=_reserve_bytes(config, card), workload=workload())
        except UNPLANNABLE as error:
            logger.debug("the memory can't be planned", exc_info=True)
            listener.on_message(f"training goes on without a plan of its memory: {reason(error)}")
            return None
        planned = made.to_json()
        write_json(folder.plan, planned)
    for text in _said(planned, config):
        listener.on_message(text)
    return _memory_of(planned)


def reason(error: Exception) -> str:
    """Why something could not be planned, in one line."""
    text = error.found if isinstance(error, EightGigError) else f"{type(error).__name__}: {error}"
    return text.strip().partition("\n")[0]


def _said(planned: Mapping[str, Any], config: TrainingConfig) -> Iterator[str]:
    peak = planned["peak"]
    yield f"planned: {format_bytes(peak['device_bytes'])} on the card at most, in {phase_word(peak['moment'])}"
    if planned["fits"] is False:
        cap_gib = config.hardware.cap_gib
        limit = f"the {planned['gpu']}" if cap_gib is None else f"hardware.cap_gib = {cap_gib:g}"
        yield (
            f"this is not expected to fit {limit}, which leaves {format_bytes(planned['budget_bytes'])} with the CUDA "
            "context; training is tried all the same. Lower data.max_length, data.image_size or training.batch_size; "
            "`eightgig plan` tries settings without training"
        )


def _reserve_bytes(config: TrainingConfig, card: GpuFacts) -> int:
    """What `hardware.cap_gib` keeps this run from using; the cap leaves the CUDA context out."""
    cap_gib = config.hardware.cap_gib
    return 0 if cap_gib is None else max(card.vram_bytes - round(cap_gib * GIB) - CONTEXT_BYTES, 0)


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
