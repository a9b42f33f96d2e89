"""The rows of several micro-batches go through a decoder layer in one pass, those of one micro-batch after the other.

So a layer's weights that come from RAM (`memory.streaming`) are brought once for all of them, forward and backward, and
what a layer takes is still that of one micro-batch: each group of rows is checkpointed by itself. Between layers the
rows are together. In the backward pass autograd takes the groups of a layer last first, and none of the layer before
until all of them are done: their gradients meet where the rows were divided.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from eightgig.core.errors import UnsupportedModel


def compute_in_groups(
    layers: Sequence[nn.Module], group_rows: int, *, row_dimensions: Mapping[str, int | None]
) -> None:
    """Wrap the forward of each of `layers`, on that instance, to take at most `group_rows` rows at a time.

    It acts in training mode alone. A layer's first positional argument are its hidden states, [rows, tokens, hidden].
    Other tensors of at least two dimensions have as many rows, which are divided alike, or one, which is for all of
    them; those of one dimension are for all. What a layer writes into a dictionary that it is given (keys and values
    for later layers) is put together.

    Args:
        layers: decoder layers, wrapped by all else that wraps them.
        group_rows: at least 1.
        row_dimensions: by name, arguments that are otherwise: along which dimension the rows lie, each of one or more
            entries; None: the same for all rows.

    Raises:
        UnsupportedModel: when it is called, a layer whose arguments can't be divided.
    """
    for layer in layers:
        layer.forward = _grouped(layer, layer.forward, group_rows, row_dimensions)


def _grouped(
    layer: nn.Module, forward: Callable[..., Any], group_rows: int, row_dimensions: Mapping[str, int | None]
) -> Callable[..., Any]:
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return forward(*args, **kwargs)
        if not args:
            raise _not_divisible(layer, "its hidden states are no positional argument")
        if len(args[0]) <= group_rows:
            return forward(*args, **kwargs)
        groups = _Groups(layer, args[0].shape[:2], group_rows, row_dimensions)
        positional: list[Sequence[Any]] = [torch.split(args[0], group_rows)]
        positional += [groups.divided(value, name) for name, value in zip(names[1:], args[1:], strict=False)]
        named = {name: groups.divided(value, name) for name, value in kwargs.items()}
        outputs = [
            forward(*[parts[i] for parts in positional], **{name: parts[i] for name, parts in named.items()})
            for i in range(groups.num_groups)
        ]
        groups.gather_written()
        return groups.together(outputs)

    return wrapped


class _Groups:
    """The rows of one call of a layer, in groups."""

    def __init__(
        self, layer: nn.Module, shape: torch.Size, group_rows: int, row_dimensions: Mapping[str, int | None]
    ) -> None:
        self._layer = layer
        self._shape = tuple(shape)  # rows, tokens
        self._num_rows = num_rows = shape[0]
        self._group_rows = group_rows
        self._row_dimensions = row_dimensions
        self.num_groups = -(-num_rows // group_rows)
        self._dictionaries: list[_DividedDictionary] = []

    def divided(self, value: Any, name: str) -> list[Any]:
        """Each group's part of the argument `name`."""
        leaves, structure = tree_flatten(value, is_leaf=_is_dictionary)
        parts = [self._of_leaf(leaf, name) for leaf in leaves]
        return [tree_unflatten([part[i] for part in parts], structure) for i in range(self.num_groups)]

    def together(self, outputs: Sequence[Any]) -> Any:
        """What the layer would return for all rows, of what it returned for each group."""
        flat = [tree_flatten(output) for output in outputs]
        structure = flat[0][1]
        leaves = [self._joined(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
        return tree_unflatten(leaves, structure)

    def gather_written(self) -> None:
        """Put what the layer has written into its dictionaries, group by group, into those that it was given."""
        for dictionary in self._dictionaries:
            for key, values in dictionary.written():
                dictionary.given[key] = self.together(values)

    def _of_leaf(self, leaf: Any, name: str) -> list[Any]:
        if _is_dictionary(leaf):
            divided = {key: self.divided(value, name) for key, value in leaf.items()}
            self._dictionaries.append(_DividedDictionary(leaf, divided, self.num_groups))
            return list(self._dictionaries[-1].groups)
        if not isinstance(leaf, Tensor) or leaf.ndim < 2:
            return [leaf] * self.num_groups
        along = self._row_dimensions.get(name, 0)
        if along is None or leaf.shape[along] == 1:
            return [leaf] * self.num_groups
        entries, rest = divmod(leaf.shape[along], self._num_rows)
        if rest or not entries or (name not in self._row_dimensions and not self._is_clear(leaf)):
            what = f"its argument {name} is {list(leaf.shape)}, for {self._num_rows} rows"
            raise _not_divisible(self._layer, what)
        return list(torch.split(leaf, self._group_rows * entries, dim=along))

    def _is_clear(self, tensor: Tensor) -> bool:
        """Whether the first dimension of a tensor of which nothing is known can only be its rows.

        Positions of three kinds come as [3, rows, tokens, ...]. Of three rows they would be divided the wrong way.
        """
        return len(tensor) == self._num_rows and tuple(tensor.shape[1:3]) != self._shape

    def _joined(self, parts: Sequence[Any]) -> Any:
        if all(isinstance(part, Tensor) and part.ndim for part in parts):
            return torch.cat(list(parts))
        if all(part is None for part in parts):
            return None
        raise _not_divisible(self._layer, f"it returns a {type(parts[0]).__name__}, which has no rows")


class _DividedDictionary:
    """A dictionary that a layer reads and writes, and one for each group in its place."""

    def __init__(self, given: MutableMapping[Any, Any], divided: Mapping[Any, list[Any]], num_groups: int) -> None:
        self.given = given
        self._divided = divided
        self.groups: list[MutableMapping[Any, Any]] = []
        for index in range(num_groups):
            own = copy.copy(given)
            own.update({key: parts[index] for key, parts in divided.items()})
            self.groups.append(own)

    def written(self) -> list[tuple[Any, list[Any]]]:
        """The keys whose values are not what the groups were given, with the values of each group."""
        first = self.groups[0]
        keys = [key for key in first if key not in self._divided or first[key] is not self._divided[key][0]]
        return [(key, [own[key] for own in self.groups]) for key in keys]


def _is_dictionary(value: Any) -> bool:
    return isinstance(value, MutableMapping)


def _not_divisible(layer: nn.Module, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the rows of a batch can't go through {type(layer).__name__} in groups: {reason}",
        expected="decoder layers whose arguments have a row for each row of the hidden states, or one for all",
        next_step="set hardware.micro_batches_per_pass to 1",
    )
