"""Reading and writing the text of configuration files: JSON, and YAML by the rules of its version 1.2.

PyYAML follows YAML 1.1, where `no` is false, `010` eight, `1:30` ninety and `1e-4` text. Here only `true` and `false`
are booleans, numbers are decimal and `1e-4` is a number. A key that stands twice is an error in both formats.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from eightgig.core.errors import Problem


class BrokenText(ValueError):
    """The text is no valid JSON or YAML; `problem` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which YAML 1.1 or 1.2 would read as anything else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # YAML 1.1 takes these for ends of lines, which PyYAML folds in every style but the one that escapes them
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def parse(text: str, suffix: str) -> Any:
    """What `text` holds, read as JSON where `suffix` is `.json`, else as YAML. Raises BrokenText."""
    return _parse_json(text) if suffix == ".json" else _parse_yaml(text)


def parse_scalar(text: str) -> Any:
    """The value that `text` would have behind a key of a YAML file: `8` a number, `null` None, `a: b` plain text.

    Quotes keep a number text: `'8'`. Nothing else of YAML's syntax is read, so regular expressions need no quotes.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError:
        return text  # a number of thousands of digits: the field's own check reports it as text
    finally:
        loader.dispose()


def render(values: Any, suffix: str) -> str:
    """`values` (mappings, lists, scalars) as JSON where `suffix` is `.json`, else as YAML; `parse` gives them back."""
    if suffix == ".json":
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise BrokenText(_broken(text, error.lineno - 1, f"no valid JSON: {error.msg}")) from error
    except BrokenText:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise BrokenText(_broken(text, 0, f"no valid JSON: {error}")) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BrokenText(Problem(twice, "given more than once", "each key once in its section"))
    return mapping


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BrokenText(_broken(text, mark.line if mark else 0, f"no valid YAML: {error.problem}")) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0)
        raise BrokenText(_broken(text, line, f"no valid YAML: {error.reason}")) from error
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's constructors of tagged scalars (`!!int x`, `!!timestamp y`) raise whatever they stumble on
        raise BrokenText(_broken(text, 0, f"no valid YAML: {error}")) from error


def _broken(text: str, line_index: int, reason: str) -> Problem:
    lines = text.splitlines()
    line = lines[line_index].strip() if line_index < len(lines) else "the end of the file"
    return Problem(f"line {line_index + 1}", line[:80], reason)
