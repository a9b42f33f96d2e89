"""The levers on a model's layers, which can be put on anew with other settings while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from eightgig.step.build import (
    checkpoint_as_configured,
    group_rows_as_configured,
    offload_as_configured,
    tile_as_configured,
)

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec


class LayerLevers:
    """What tiles, checkpointing, layer inputs on the host and groups of rows change of a model: forwards of modules."""

    def __init__(self, spec: ModelSpec, model: nn.Module) -> None:
        """Note the forwards of `model` as they are, before any of these levers."""
        self._spec, self._model = spec, model
        self._plain = {module: vars(module).get("forward") for module in model.modules()}

    @property
    def can_tile(self) -> bool:
        """Whether every decoder layer has an MLP that can be told from the rest of it."""
        family = self._spec.family
        return all(family.mlp(layer) is not None for layer in family.decoder_layers(self._model))

    def put_on(self, config: TrainingConfig) -> None:
        """Take off those that are on, and put on what `config` asks for, from the inside out.

        Raises:
            ConfigError: `config` asks for what the model does not have.
        """
        for module, forward in self._plain.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        tile_as_configured(config, self._spec, self._model)
        checkpoint_as_configured(config, self._spec, self._model)
        offload_as_configured(config, self._spec, self._model)
        group_rows_as_configured(config, self._spec, self._model)
