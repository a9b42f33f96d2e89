"""Variants of a run's settings, each simulated when it is first asked for, on a fake model that many of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eightgig.config.loading import validated
from eightgig.core.errors import ConfigError
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.plan.card_rates import CardRates
from eightgig.plan.plan import Placed, capability_of, place, planned_precision, time_of
from eightgig.plan.simulate import Simulator
from eightgig.plan.workload import Workload

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec
    from eightgig.registry.gpus import GpuFacts

Changes = Mapping[str, Any]
"""Paths of settings and the values they get."""

WorkloadOf = Callable[["TrainingConfig"], Workload]
"""Makes the largest micro-batch of some settings."""


@dataclass(frozen=True)
class Candidate(Placed):
    """One variant: `config`, simulated and held against the card."""

    config: TrainingConfig

    @property
    def device_bytes(self) -> int:
        """Peak on the card."""
        return self.result.peak_reserved_bytes + CONTEXT_BYTES


class Candidates:
    """Variants of `config` that share its model: method, adapters, precision and image size stay.

    What the weights are stored as may differ: each way has a fake model of its own.
    """

    def __init__(
        self,
        config: TrainingConfig,
        spec: ModelSpec,
        gpu: GpuFacts,
        budget_bytes: int,
        workload_of: WorkloadOf,
        rates: CardRates | None,
    ) -> None:
        """Build the model."""
        self.config = config
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.rates = rates
        self._workload_of = workload_of
        self._validates = False
        self._known: dict[tuple[tuple[str, Any], ...], Candidate | None] = {}
        self.spec = spec
        self._simulators: dict[str, Simulator] = {}
        self._simulator_of(config, workload_of(config))

    def with_validation(self) -> Candidates:
        """The same on the same model, but validation is simulated too, without which a variant may seem to fit."""
        whole = copy.copy(self)
        whole._validates, whole._known = True, {}
        return whole

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers of the model."""
        return next(iter(self._simulators.values())).num_decoder_layers

    def get(self, changes: Changes) -> Candidate | None:
        """The variant with `changes`; None where they contradict settings that stay.

        Raises:
            UnsupportedModel: the model can't be planned.
        """
        key = tuple(sorted(changes.items()))
        if key not in self._known:
            config = with_changes(self.config, changes)
            try:
                self._known[key] = None if config is None else self._simulated(config)
            except ConfigError:  # the model does not go with them
                self._known[key] = None
        return self._known[key]

    def given(self) -> Candidate:
        """`config` itself.

        Raises:
            ConfigError: the model does not go with it.
            UnsupportedModel: the model can't be planned.
        """
        found = self.get({})
        return self._simulated(self.config) if found is None else found

    def _simulated(self, config: TrainingConfig) -> Candidate:
        work = self._workload_of(config)
        simulation = self._simulator_of(config, work).run(config, work, validates=self._validates)
        result, fits = place(simulation, config, self.gpu, self.budget_bytes)
        return Candidate(work, simulation, result, fits, time_of(simulation, config, work, self.rates), config)

    def _simulator_of(self, config: TrainingConfig, work: Workload) -> Simulator:
        """The model on which runs of `config` are simulated, built where it is the first that stores weights so.

        Raises:
            ConfigError: the model's weights can't be stored so.
        """
        stored = config.training.quantization.model_dump_json()
        if stored not in self._simulators:
            precision = planned_precision(config, self.gpu)
            self._simulators[stored] = Simulator(config, self.spec, work.processor, precision, capability_of(self.gpu))
        return self._simulators[stored]


def with_changes(config: TrainingConfig, changes: Changes) -> TrainingConfig | None:
    """`config` with `changes`; None where a rule of the configuration forbids them."""
    values = config.model_dump(mode="json")
    for path, value in changes.items():
        *groups, name = path.split(".")
        group = values
        for each in groups:
            group = group[each]
        group[name] = value
    try:
        return validated(values, "plan")
    except ConfigError:
        return None
