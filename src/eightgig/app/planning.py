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

from eightgig.app.card_wanted import CardWanted, facts_of_card
from eightgig.app.plan_cache import plan_cache, plan_key
from eightgig.config import DataConfig, TrainingConfig
from eightgig.core.errors import UnsupportedModel
from eightgig.core.units import GIB
from eightgig.data.quarantine import Quarantine
from eightgig.data.sets import read_data
from eightgig.registry import resolve
from eightgig.registry.gpus import GpuFacts

if TYPE_CHECKING:
    from eightgig.data.sample import Sample
    from eightgig.plan.data_workload import DataFacts, DataWorkloads
    from eightgig.plan.plan import Plan
    from eightgig.plan.step_time import PlannedTime
    from eightgig.plan.workload import Workload
    from eightgig.registry import ModelSpec


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


class UserData:
    """The data of one call, read at once and measured once: how many tokens a sample has does not depend on the method.

    Bad records will be listed in a folder of this call's own.

    Raises:
        DataError: the files that `settings` names are missing, or of no known shape.
    """

    def __init__(self, settings: DataConfig) -> None:
        folder = Path(tempfile.gettempdir()) / f"eightgig-plan-{uuid.uuid4().hex[:8]}"
        self.read = read_data(settings, Quarantine(folder / "quarantine.jsonl"))
        self._workloads: DataWorkloads | None = None

    @classmethod
    def of(cls, config: TrainingConfig) -> UserData | None:
        """The data that `config` names, if any."""
        return None if config.data.data_path is None else cls(config.data)

    def workloads(self, config: TrainingConfig, spec: ModelSpec) -> DataWorkloads:
        """The micro-batches that it makes; `config` and `spec` are the same in each call but for the method."""
        from eightgig.plan.data_workload import data_workloads

        if self._workloads is None:
            self._workloads = data_workloads(config, spec, self.read)
            if not len(self.read.quarantine):
                shutil.rmtree(self.read.quarantine.path.parent, ignore_errors=True)
        return self._workloads


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
    return _answer(_question(config, card), UserData.of(config))


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
    return _plan_as_json(_question(config, card), UserData.of(config), uses_cache=uses_cache)


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
    data = UserData.of(next(iter(configs.values())))
    for method, config in configs.items():
        question = _question(config, card)
        try:
            compared[method] = _plan_as_json(question, data, uses_cache=uses_cache)
        except UnsupportedModel as error:
            errors.append(error)
            compared[method] = {"error": str(error)}
    if len(errors) == len(configs):
        raise errors[0]
    return {"compare": compared}


def _plan_as_json(question: Question, data: UserData | None, *, uses_cache: bool) -> dict[str, Any]:
    key = plan_key(
        question.config,
        gpu=question.gpu,
        driver=question.driver,
        reserve_bytes=question.reserve_bytes,
        read=None if data is None else data.read,
    )
    kept = plan_cache().get(key) if uses_cache and key is not None else None
    if isinstance(kept, dict):
        return kept
    planned: dict[str, Any] = json.loads(json.dumps(_answer(question, data).to_json()))  # as a file gives it back
    if key is not None:
        plan_cache().put(key, planned)
    return planned


def _question(config: TrainingConfig, card: CardWanted) -> Question:
    facts, driver = facts_of_card(card)
    return Question(config, facts, driver, round(card.reserve_gib * GIB))


def _answer(question: Question, data: UserData | None) -> Plan:
    spec = resolve(question.config.model.name, question.config.model.revision)
    from eightgig.plan.plan import plan

    if data is None:
        planned = plan(question.config, spec, question.gpu, reserve_bytes=question.reserve_bytes)
        return replace(planned, workload={**planned.workload, "data": None})
    found = data.workloads(question.config, spec)

    def planned_for(work: Workload) -> Plan:
        return plan(question.config, spec, question.gpu, reserve_bytes=question.reserve_bytes, workload=work)

    plans = {reason: planned_for(work) for reason, work in found.largest.items()}
    decisive = max(plans, key=lambda reason: plans[reason].peak.device_bytes)
    samples = [_name_of(sample) for sample in found.largest[decisive].samples]
    facts = {"decided_by": decisive, "samples": samples, **_data_json(found.facts)}
    planned = plans[decisive]
    usual = planned if planned.time is None else planned_for(found.usual)
    return replace(planned, workload={**planned.workload, "data": facts}, time=_time_of_epoch(usual.time, found.facts))


def _name_of(sample: Sample) -> str:
    """Where a sample stands, with its id where that says more."""
    source = str(sample.source)
    return source if sample.sample_id in source else f"{sample.sample_id} ({source})"


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
