"""`eightgig plan`: what a run will take of a card's memory, before anything is downloaded.

Nothing here imports torch before a plan has to be made: one that was made before is found without it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.app.plan_cache import plan_cache, plan_key
from eightgig.config import TrainingConfig, save_config
from eightgig.config.files import known_suffix
from eightgig.core.errors import ConfigError, DoesNotFit, Problem, UnsupportedModel
from eightgig.core.units import GIB, format_bytes
from eightgig.data.quarantine import Quarantine
from eightgig.data.sets import ReadData, read_data
from eightgig.memory.card_at_hand import card_at_hand
from eightgig.registry import resolve
from eightgig.registry.gpus import GpuFacts, get_gpu, gpu_of_vram

if TYPE_CHECKING:
    from eightgig.plan.data_workload import DataFacts
    from eightgig.plan.plan import Plan, PlannedTime
    from eightgig.plan.workload import Workload


@dataclass(frozen=True)
class CardWanted:
    """The card that a plan is for: `gpu` by name, one of `vram_gib`, else the one in this machine, else none.

    Attributes:
        reserve_gib: of the card's memory, kept free for its other users.
    """

    gpu: str | None = None
    vram_gib: float | None = None
    reserve_gib: float = 0.0


@dataclass(frozen=True)
class Question:
    """What is asked: whether `config` fits a card.

    Attributes:
        gpu: None plans without a limit.
        driver: of a card that is in this machine.
        reserve_bytes: of the card's memory, kept free.
    """

    config: TrainingConfig
    gpu: GpuFacts | None
    driver: str | None
    reserve_bytes: int


@dataclass(frozen=True)
class Answer:
    """A plan, and whether asking again would give the same."""

    plan: Plan
    is_lasting: bool


def plan_run(
    config: TrainingConfig, *, gpu: str | None = None, vram_gib: float | None = None, reserve_gib: float = 0.0
) -> Plan:
    """The plan of `config` on a card: the one named, one of `vram_gib`, else the one in this machine, else none.

    Where `config` names training data, its samples decide: the largest micro-batch that they can make has to fit, a
    usual one sets the time. Else it is one image and `data.max_length` tokens of text.

    Raises:
        ConfigError: no card is called so, or a setting does not suit the model.
        DataError: the data can't be used; the same that training would raise.
        UnsupportedModel: the model is unknown, or can't be simulated.
        EnvironmentProblem: the hub can't be reached, which models outside the registry need.
    """
    card = CardWanted(gpu, vram_gib, reserve_gib)
    return _answer(_question(config, card), _read(config)).plan


def plan_as_json(
    config: TrainingConfig,
    card: CardWanted,
    *,
    uses_cache: bool = True,
) -> dict[str, Any]:
    """`plan_run` as plain data (docs/reference/plan_json.md); kept, and with `uses_cache` taken from what was kept.

    Raises:
        EightGigError: as `plan_run`.
    """
    return _plan_as_json(_question(config, card), uses_cache=uses_cache)


def compare_as_json(
    configs: Mapping[str, TrainingConfig],
    card: CardWanted,
    *,
    uses_cache: bool = True,
) -> dict[str, Any]:
    """`plan_as_json` of each of `configs`, by method, under `compare`; `{"error": why}` for one that can't be planned.

    Raises:
        EightGigError: as `plan_run`; what one method alone can't do is no error unless none can.
    """
    compared: dict[str, Any] = {}
    errors: list[UnsupportedModel] = []
    for method, config in configs.items():
        question = _question(config, card)
        try:
            compared[method] = _plan_as_json(question, uses_cache=uses_cache)
        except UnsupportedModel as error:
            errors.append(error)
            compared[method] = {"error": str(error)}
    if len(errors) == len(configs):
        raise errors[0]
    return {"compare": compared}


def check_config_path(path: Path) -> None:
    """Raise ConfigError where no configuration can be written to `path`: its suffix is none's, or it exists."""
    known_suffix(path)
    if path.exists():
        raise ConfigError(
            [Problem("--write", str(path), "a file that does not exist yet, so that no settings are lost")],
            source="command line",
            next_step=f"choose another name, or delete {path}",
        )


def write_config(planned: Mapping[str, Any], path: Path) -> None:
    """Write the settings of a plan to `path`, for `eightgig train`.

    Raises:
        DoesNotFit: the plan says that they would not fit; nothing is written.
        ConfigError: as `check_config_path`.
    """
    check_config_path(path)
    if planned["fits"] is False:
        needed, budget = format_bytes(planned["peak"]["device_bytes"]), format_bytes(planned["budget_bytes"])
        raise DoesNotFit(
            f"{path} was not written: the run would take {needed} of the card's {budget}",
            expected="settings that fit the card",
            next_step="plan a smaller data.max_length, data.image_size or model, method qlora, or a larger card",
        )
    save_config(TrainingConfig.model_validate(planned["config"]), path)


def _plan_as_json(question: Question, *, uses_cache: bool) -> dict[str, Any]:
    read = _read(question.config)
    key = plan_key(
        question.config,
        gpu=question.gpu,
        driver=question.driver,
        reserve_bytes=question.reserve_bytes,
        read=read,
    )
    kept = plan_cache().get(key) if uses_cache and key is not None else None
    if isinstance(kept, dict):
        return kept
    answer = _answer(question, read)
    planned: dict[str, Any] = json.loads(json.dumps(answer.plan.to_json()))  # as it comes back from a file
    if key is not None and answer.is_lasting:
        plan_cache().put(key, planned)
    return planned


def _question(config: TrainingConfig, card: CardWanted) -> Question:
    facts, driver = _facts(card)
    return Question(config, facts, driver, round(card.reserve_gib * GIB))


def _facts(card: CardWanted) -> tuple[GpuFacts | None, str | None]:
    """The card that is meant, and the driver's version where it is in this machine."""
    if card.gpu is not None:
        vram_bytes = None if card.vram_gib is None else round(card.vram_gib * GIB)
        return get_gpu(card.gpu, vram_bytes=vram_bytes), None
    if card.vram_gib is not None:
        return gpu_of_vram(card.vram_gib), None
    found = card_at_hand()
    return (None, None) if found is None else (found.gpu, found.driver)


def _read(config: TrainingConfig) -> ReadData | None:
    """The user's data, if any is named. Bad records will be listed in a folder of this call's own."""
    if config.data.data_path is None:
        return None
    folder = Path(tempfile.gettempdir()) / f"eightgig-plan-{uuid.uuid4().hex[:8]}"
    return read_data(config.data, Quarantine(folder / "quarantine.jsonl"))


def _answer(question: Question, read: ReadData | None) -> Answer:
    spec = resolve(question.config.model.name, question.config.model.revision)
    from eightgig.plan.plan import plan

    if read is None:
        planned = plan(question.config, spec, question.gpu, reserve_bytes=question.reserve_bytes)
        return Answer(replace(planned, workload={**planned.workload, "data": None}), is_lasting=True)
    from eightgig.plan.data_workload import data_workloads

    found = data_workloads(question.config, spec, read)
    if not len(read.quarantine):
        shutil.rmtree(read.quarantine.path.parent, ignore_errors=True)

    def planned_for(work: Workload) -> Plan:
        return plan(question.config, spec, question.gpu, reserve_bytes=question.reserve_bytes, workload=work)

    plans = {reason: planned_for(work) for reason, work in found.largest.items()}
    decisive = max(plans, key=lambda reason: plans[reason].peak.device_bytes)
    samples = [f"{sample.sample_id} ({sample.source})" for sample in found.largest[decisive].samples]
    data = {"decided_by": decisive, "samples": samples, **_data_json(found.facts)}
    planned = plans[decisive]
    usual = planned if planned.time is None else planned_for(found.usual)
    return Answer(
        replace(planned, workload={**planned.workload, "data": data}, time=_time_of_epoch(usual.time, found.facts)),
        is_lasting=found.facts.has_own_tokenizer,
    )


def _data_json(facts: DataFacts) -> dict[str, Any]:
    return {
        "num_train_samples": facts.num_train_samples,
        "num_validation_samples": facts.num_validation_samples,
        "steps_an_epoch": facts.steps_an_epoch,
        "mean_tokens": facts.mean_tokens,
        "max_tokens": facts.max_tokens,
        "notes": list(facts.notes),
    }


def _time_of_epoch(time: PlannedTime | None, facts: DataFacts) -> PlannedTime | None:
    """`time` of a usual step, with that of an epoch, whose last step may hold fewer samples."""
    if time is None:
        return None
    return replace(time, epoch_s=time.step_s * facts.num_train_samples / facts.samples_a_step)
