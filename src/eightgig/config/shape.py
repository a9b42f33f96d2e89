"""The layout of all settings, read off the JSON schema: which keys a section has and what a setting may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from eightgig.config.schema import TrainingConfig


@cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file; editors complete and check files with it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainingConfig.model_json_schema()}


def setting(path: str) -> Mapping[str, Any] | None:
    """The schema of the setting or section at the dotted `path`; None where there is none."""
    node: Mapping[str, Any] = json_schema()
    for key in path.split(".") if path else ():
        properties = _properties(node)
        if key not in properties:
            return None
        node = properties[key]
    return node


def section_keys(path: str) -> tuple[str, ...]:
    """The keys of the section at the dotted `path`; empty where it is no section."""
    node = setting(path)
    return tuple(_properties(node)) if node is not None else ()


@cache
def all_paths() -> tuple[str, ...]:
    """The dotted paths of all settings, in the order of the schema; sections themselves are left out."""
    return tuple(_leaves(json_schema(), ""))


def allowed(path: str) -> str:
    """What the setting at the dotted `path` may be, e.g. `a whole number from 1 to 1024`."""
    node = setting(path)
    if node is None:
        return "no setting of this name"
    return " or ".join(_allowed(option) for option in _options(node))


def meaning(path: str) -> str:
    """What the setting at the dotted `path` does, in a line."""
    node = setting(path)
    return str(node.get("description", "")) if node is not None else ""


def _options(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The alternatives of `node`, references followed."""
    options = node.get("anyOf", [node])
    return [_followed(option) for option in options]


def _followed(node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    if reference is None:
        return node
    followed: Mapping[str, Any] = json_schema()["$defs"][reference.rsplit("/", 1)[1]]
    return followed


def _properties(node: Mapping[str, Any]) -> Mapping[str, Any]:
    properties: dict[str, Any] = {}
    for option in _options(node):
        properties.update(option.get("properties", {}))
    return properties


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    properties = _properties(node)
    if not properties:
        yield prefix
    for key, child in properties.items():
        yield from _leaves(child, f"{prefix}.{key}" if prefix else key)


def _allowed(option: Mapping[str, Any]) -> str:
    if "enum" in option:
        return f"one of {', '.join(option['enum'])}"
    if "const" in option:
        return str(option["const"])
    match option["type"]:
        case "null":
            return "null"
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _range(option)
        case "number":
            return "a number" + _range(option)
        case "object":
            return f"a group of settings ({', '.join(_properties(option))})"
        case _:
            return "a path" if option.get("format") == "path" else "text (in quotes where it looks like a number)"


def _range(option: Mapping[str, Any]) -> str:
    low, above = option.get("minimum"), option.get("exclusiveMinimum")
    high, below = option.get("maximum"), option.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = [
        f"{word} {bound}"
        for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return f" {' and '.join(words)}" if words else ""
