"""The house rules that a machine can check, over every module of the package and of its tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = sorted((ROOT / "src" / "eightgig").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 80
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def _id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _caught_names(handler: ast.ExceptHandler) -> set[str]:
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {"everything" if node is None else ast.unparse(node) for node in caught}


def _reraises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler only tidies up: its last statement is a bare `raise`."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _asserts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function itself asserts, or uses something that does, by its name."""
    body = ast.dump(ast.Module(body=function.body, type_ignores=[]))
    return re.search(r"Assert\(|raises|assert_|check_|expect|warns", body) is not None


def _calls(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {callee.id for callee in calls if isinstance(callee, ast.Name)}


def test_there_is_something_to_check() -> None:
    assert len(SOURCE) > 50
    assert len(TESTS) > 10


@pytest.mark.parametrize("path", SOURCE, ids=_id)
def test_a_module_holds_one_thing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_MODULE_LINES
    assert path.stem not in EMPTY_NAMES
    too_long = {
        function.name: (function.end_lineno or 0) - function.lineno + 1
        for function in _functions(ast.parse(text))
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


@pytest.mark.parametrize("path", SOURCE, ids=_id)
def test_nothing_is_swallowed_stubbed_or_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for handler in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)):
        assert not isinstance(handler.body[0], ast.Pass), f"line {handler.lineno}: swallowed in silence"
        if "cli" not in path.relative_to(ROOT / "src" / "eightgig").parts and not _reraises(handler):
            broad = _caught_names(handler) & {"everything", "Exception", "BaseException"}
            assert not broad, f"line {handler.lineno}: catches {broad} outside the command line"
    assert not re.search(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b", text)  # in classes, so as not to find this line itself
    assert "NotImplementedError" not in text


@pytest.mark.parametrize("path", TESTS, ids=_id)
def test_every_test_can_fail(path: Path) -> None:
    functions = {function.name: function for function in _functions(ast.parse(path.read_text(encoding="utf-8")))}
    checking = {name for name, function in functions.items() if _asserts(function)}
    toothless = [
        name
        for name, function in functions.items()
        if name.startswith("test_") and name not in checking and not _calls(function) & checking
    ]
    assert toothless == []


def test_every_package_says_what_it_is_for() -> None:
    undocumented = [
        _id(path) for path in SOURCE if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert undocumented == []
