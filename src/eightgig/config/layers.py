"""Laying sources of settings over each other, and remembering which one each value came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eightgig.config.method import LOAD_IN_4BIT_PATH, LORA_PATH, METHOD_PATH
from eightgig.config.preset_cards import PresetCard

KeyPath = tuple[str, ...]

_MAX_DEPTH = 4  # no setting lies deeper; what does, however deep, is reported as one wrong value
_ABSENT = object()
_METHOD = tuple(METHOD_PATH.split("."))
_LOAD_IN_4BIT = tuple(LOAD_IN_4BIT_PATH.split("."))
_LORA = tuple(LORA_PATH.split("."))


@dataclass(frozen=True)
class Layer:
    """Settings of one source, nested as in a file; later layers win over earlier ones."""

    source: str
    values: Mapping[Any, Any]


def nested(values_by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path, nested as in a file."""
    tree: dict[str, Any] = {}
    for path, value in values_by_path.items():
        for key_path, leaf in _leaves(value, tuple(path.split("."))):
            _put(tree, key_path, leaf)
    return tree


def preset_layer(card: PresetCard) -> Layer:
    """The values of a preset as a layer."""
    values = nested({path: choice.value for path, choice in card.choices.items()})
    return Layer(f"preset {card.name}", {"preset": card.name, **values})


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The merged settings, nested, and the source of each path that a layer gave.

    The training method, LoRA and 4-bit weights follow from each other (see `method`). Where a later layer says
    something new about one of them, what earlier layers said about the others no longer counts: `method: lora` over a
    preset with 4-bit weights means 16-bit weights.
    """
    merged: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    for layer in layers:
        for path in _released(merged, layer.values):
            remove(merged, path)
            _forget(sources, path)
        for path, value in _leaves(layer.values, ()):
            if value == {} and isinstance(get(merged, path), dict):
                continue  # an empty group says nothing about one that is there
            _put(merged, path, value)
            _forget(sources, path)
            if value != {}:
                sources[path] = layer.source
    return merged, sources


def source_of(path: KeyPath, sources: Mapping[KeyPath, str]) -> str | None:
    """The source of `path`: its own, or that of the group it lies in; None where no layer gave it."""
    return next((sources[path[:end]] for end in range(len(path), 0, -1) if path[:end] in sources), None)


def get(tree: Mapping[Any, Any], path: Sequence[Any], default: Any = None) -> Any:
    """The value at `path` of nested settings, `default` where there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def remove(tree: dict[str, Any], path: Sequence[Any]) -> None:
    """Take the value at `path` out of nested settings, if it is there."""
    if not path:
        return
    group = get(tree, path[:-1])
    if isinstance(group, dict):
        group.pop(path[-1], None)


def _released(lower: Mapping[Any, Any], upper: Mapping[Any, Any]) -> list[KeyPath]:
    """Paths of `lower` that what `upper` says about the training method makes void."""
    method = get(upper, _METHOD, _ABSENT)
    load_in_4bit = get(upper, _LOAD_IN_4BIT, _ABSENT)
    lora = get(upper, _LORA, _ABSENT)
    lower_has_no_lora = get(lower, _LORA, _ABSENT) is None
    if method is not _ABSENT:
        drops_lora = lower_has_no_lora or (isinstance(method, str) and method.lower() == "full")
        return [_LOAD_IN_4BIT, _LORA] if drops_lora else [_LOAD_IN_4BIT]
    if lora is None:
        return [_METHOD, _LOAD_IN_4BIT]
    if load_in_4bit is not _ABSENT:
        return [_METHOD, _LORA] if load_in_4bit is True and lower_has_no_lora else [_METHOD]
    if lora is not _ABSENT and lower_has_no_lora:
        return [_METHOD]
    return []


def _leaves(value: Any, prefix: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Path and value of everything in `value` that is no group of settings, and of empty groups."""
    if not isinstance(value, Mapping) or not value or len(prefix) == _MAX_DEPTH:
        yield prefix, value
        return
    for key, child in value.items():
        yield from _leaves(child, (*prefix, str(key)))


def _put(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        child = tree.get(key)
        if not isinstance(child, dict):
            child = tree[key] = {}
        tree = child
    tree[path[-1]] = value


def _forget(sources: dict[KeyPath, str], path: KeyPath) -> None:
    """Drop the sources of `path`, of all in it, and of the groups around it, which no longer come from one source."""
    overlapping = [known for known in sources if known[: len(path)] == path or path[: len(known)] == known]
    for known in overlapping:
        del sources[known]
