"""`eightgig plan`: what a run will take of a card's memory, before anything is downloaded.

Nothing here imports torch before a plan has to be made: one that was made before is found without it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.app.card_wanted import CardWanted, facts_of_card
from eightgig.app.measured_rates import rates_at_hand
from eightgig.app.plan_cache import plan_cache, plan_key
from eightgig.config import DataConfig, TrainingConfig
from eightgig.core.errors import UnsupportedModel
from eightgig.core.garbage import collector_paused
from eightgig.core.units import GIB
from eightgig.data.quarantine import Quarantine
from eightgig.data.sets import read_data
from eightgig.registry import resolve
from eightgig.registry.gpus import GpuFacts

if TYPE_CHECKING:
    from eightgig.data.sample import Sample
    from eightgig.plan.candidates import WorkloadOf
    from eightgig.plan.card_rates import CardRates
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
        fixed: paths of the settings that stay, where faster ones are looked for; None plans `config` as it is.
    """

    config: TrainingConfig
    gpu: GpuFacts | None
    driver: str | None
    reserve_bytes: int
    fixed: frozenset[str] | None = None


class UserData:
    """The data of one call, read at once and measured once: how many tokens a sample has does not depend on the method.

    Bad records will be listed in a folder of this call's own.

    Raises:
        DataError: the files that `settings` names are missing, or of no known shape.
    """

    def __init__(self, settings: DataConfig) -> None:
        folder = Path(tempfile.gettempdir()) / f"eightgig-plan-{uuid.uuid4().hex[:8]}"
        self.read = read_data(settings, Quarantine(folder / "quarantine.jsonl"))
        self._workloads: dict[tuple[int, int], DataWorkloads] = {}

    @classmethod
    def of(cls, config: TrainingConfig) -> UserData | None:
        """The data that `config` names, if any."""
        return None if config.data.data_path is None else cls(config.data)

    def workloads(self, config: TrainingConfig, spec: ModelSpec) -> DataWorkloads:
        """The micro-batches that it makes; `config` and `spec` are the same in each call but for method and batches."""
        from eightgig.plan.data_workload import data_workloads

        size = (config.training.batch_size, config.samples_per_pass)
        if size not in self._workloads:
            self._workloads[size] = data_workloads(config, spec, self.read)
            if not len(self.read.quarantine):
                shutil.rmtree(self.read.quarantine.path.parent, ignore_errors=True)
        return self._workloads[size]


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
    fixed: Collection[str] | None = None,
) -> dict[str, Any]:
    """`plan_run` as plain data (docs/reference/plan_json.md); kept, and with `uses_cache` taken from what was kept.

    With `fixed`, the paths of settings that stay, it is the plan of the fastest settings that fit the card.

    Raises:
        EightGigError: as `plan_run`.
    """
    question = replace(_question(config, card), fixed=None if fixed is None else frozenset(fixed))
    return _plan_as_json(question, UserData.of(config), uses_cache=uses_cache)


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
        fixed=question.fixed,
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
    with collector_paused():
        from eightgig.plan.search import search  # noqa: F401 - with all that planning needs; it takes seconds
        from eightgig.plan.workload import LargestWorkloads

    rates = rates_at_hand(question.gpu, question.driver)
    if data is None:
        planned = _planned(question, spec, rates, LargestWorkloads(spec))
        return replace(planned, workload={**planned.workload, "data": None})
    return _answer_with(question, spec, rates, data)


def _answer_with(question: Question, spec: ModelSpec, rates: CardRates | None, data: UserData) -> Plan:
    """The plan for the largest samples of `data`; those that take the most as configured decide the settings."""
    from eightgig.plan.plan import plan

    def as_it_is(config: TrainingConfig, work: Workload) -> Plan:
        return plan(config, spec, question.gpu, reserve_bytes=question.reserve_bytes, workload=work, rates=rates)

    largest = data.workloads(question.config, spec).largest
    first = max(largest, key=lambda reason: largest[reason].batch.num_tokens)
    chosen = _planned(question, spec, rates, lambda config: data.workloads(config, spec).largest[first])
    config = type(question.config).model_validate(chosen.config)
    found = data.workloads(config, spec)
    others = {reason: as_it_is(config, work) for reason, work in found.largest.items() if reason != first}
    plans = {first: chosen, **others}
    decisive = max(plans, key=lambda reason: plans[reason].peak.device_bytes)
    samples = [_name_of(sample) for sample in found.largest[decisive].samples]
    facts = {"decided_by": decisive, "samples": samples, **_data_json(found.facts)}
    planned = replace(plans[decisive], levers=chosen.levers, alternatives=chosen.alternatives)
    usual = planned if planned.time is None else as_it_is(config, found.usual)
    return replace(planned, workload={**planned.workload, "data": facts}, time=_time_of_epoch(usual.time, found.facts))


def _planned(question: Question, spec: ModelSpec, rates: CardRates | None, workload_of: WorkloadOf) -> Plan:
    from eightgig.plan.plan import plan
    from eightgig.plan.search import search

    if question.fixed is None or question.gpu is None:
        work = workload_of(question.config)
        return plan(
            question.config, spec, question.gpu, reserve_bytes=question.reserve_bytes, workload=work, rates=rates
        )
    return search(
        question.config,
        spec,
        question.gpu,
        reserve_bytes=question.reserve_bytes,
        fixed=question.fixed,
        workload_of=workload_of,
        rates=rates,
    )


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
