"""The levers on memory that a plan may choose: what "auto" stands for until one has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from eightgig.config.schema import HardwareConfig, TrainingConfig

AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True)
class Levers:
    """Values of the settings of `hardware` that may be "auto"; by default those of a run without any of them."""

    checkpointed_layers: int | None = None
    offload_layer_inputs: bool = False
    mlp_tile_tokens: int | None = None
    embedding_on_host: bool = False
    streamed_layers: int = 0
    cache_image_features: bool = False
    micro_batches_per_pass: int = 1

    @classmethod
    def of(cls, hardware: HardwareConfig) -> Levers:
        """Those of `hardware`, where "auto" leaves the plain value."""
        given = {name: getattr(hardware, name) for name in LEVER_NAMES}
        return cls(**{name: value for name, value in given.items() if value != AUTO})


LEVER_NAMES = tuple(field.name for field in fields(Levers))


def automatic_paths(config: TrainingConfig) -> frozenset[str]:
    """Dotted paths of the levers that `config` leaves to the plan."""
    return frozenset(f"hardware.{name}" for name in LEVER_NAMES if getattr(config.hardware, name) == AUTO)


def settled(config: TrainingConfig, chosen: Mapping[str, Any] | None = None) -> TrainingConfig:
    """`config` with nothing left to the plan.

    Args:
        config: the settings.
        chosen: values by name, for the levers that are "auto"; for those without one the plain value holds.
    """
    automatic = {path.rpartition(".")[2] for path in automatic_paths(config)}
    own = {name: value for name, value in (chosen or {}).items() if name in automatic}
    values = {**asdict(config.hardware.levers), **own}
    return config.model_copy(update={"hardware": config.hardware.model_copy(update=values)})
