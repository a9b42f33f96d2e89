"""A frozen vision tower's features in place of its pixels: taken once, then fed to a model whose tower is off the card.

The model's own code runs up to the tower's end to take them, and from there on when they are fed: `pixel_values` then
carry the features, and what stands in the tower's place hands them on as the tower's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.registry.family import ModelFamily

PIXELS = "pixel_values"
"""The model input that carries pixels, and in their place features."""

_NAMES_OF_THE_INPUT = (PIXELS, "hidden_states")  # what transformers' towers call their first argument


class _TowerDone(Exception):
    """Ends the model's forward pass where the tower's ends."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class FedTower(nn.Module):
    """Stands in a tower's place and returns the features that it is given, as the tower's output.

    It has no weights: the tower is kept where neither `parameters` nor `to` finds it. What else the model asks its
    tower for (its dtype, the size of its patches) the tower answers.
    """

    def __init__(self, tower: nn.Module, model: nn.Module, family: ModelFamily) -> None:
        super().__init__()
        self.hidden_away = (tower, model)  # in a tuple, so that they are no submodules
        self.family = family

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The tower's output that holds the features, which come as the tower's first argument."""
        given = [*args, *(kwargs[name] for name in _NAMES_OF_THE_INPUT if name in kwargs)]
        return self.family.tower_output(self.hidden_away[1], given[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("hidden_away", "family"):  # not set yet: copying makes an empty module first
                raise
            return getattr(self.hidden_away[0], name)


class FedModel:
    """A model that takes features in place of pixels, until its tower is put back."""

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        """Put a `FedTower` in the place of the tower of `model`, on this instance."""
        parent_path, _, self._name = family.modules.towers[0].rpartition(".")
        root = base_model(model)
        self._parent: nn.Module = root.get_submodule(parent_path)
        self.tower: nn.Module = getattr(self._parent, self._name)
        setattr(self._parent, self._name, FedTower(self.tower, root, family))

    def take_back(self) -> None:
        """Put the tower back in its place, on whatever device it is; the model takes pixels again."""
        setattr(self._parent, self._name, self.tower)


def tower_of(model: nn.Module, family: ModelFamily) -> nn.Module:
    """The tower whose features are kept: the family's first."""
    tower: nn.Module = base_model(model).get_submodule(family.modules.towers[0])
    return tower


def tower_features(model: nn.Module, family: ModelFamily, inputs: Mapping[str, Any]) -> Tensor:
    """What `model` reads of its tower's output for `inputs`, [rows, ..., width], in eval mode and without a graph.

    `inputs` are those of a batch with images, on the model's device. Nothing above the tower is computed.
    """
    tower = tower_of(model, family)
    was_training = tower.training

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        raise _TowerDone(output)

    hook = tower.register_forward_hook(stop)
    tower.eval()
    try:
        with torch.no_grad():
            family.hidden_states(model, inputs)
    except _TowerDone as done:
        features: Tensor = family.tower_features(model, done.output)
        return features.detach()
    finally:
        hook.remove()
        tower.train(was_training)
    raise ValueError(f"the forward pass of {type(model).__name__} never came to its tower: inputs without an image?")


def rows_of_features(num_feature_rows: int, num_pixel_rows: int, of_image: int) -> int:
    """How many of `num_feature_rows` belong to an image that has `of_image` of all `num_pixel_rows` rows of pixels."""
    rows, rest = divmod(num_feature_rows * of_image, num_pixel_rows)
    if rest:
        raise ValueError(f"{num_feature_rows} rows of features can't be shared out over {num_pixel_rows} of pixels")
    return rows
