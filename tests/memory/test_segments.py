"""Which runs have expandable segments."""

from __future__ import annotations

import pytest

from eightgig.memory.segments import VARIABLE, expects_expandable_segments, prefer_expandable_segments


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("linux", "6.8.0-45-generic", True),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", False),
        ("win32", "11", False),
        ("darwin", "24.0.0", True),
    ],
)
def test_the_system_decides_where_the_user_says_nothing(system: str, release: str, expected: bool) -> None:
    assert expects_expandable_segments({}, system, release) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({VARIABLE: "expandable_segments:True"}, True),
        ({VARIABLE: "max_split_size_mb:128, expandable_segments:false"}, False),
        ({VARIABLE: "max_split_size_mb:128"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
    ],
)
def test_what_the_user_set_decides(given: dict[str, str], expected: bool) -> None:
    for system, release in [("linux", "6.8.0"), ("win32", "11")]:
        assert expects_expandable_segments(given, system, release) is expected


def test_the_users_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (VARIABLE, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(VARIABLE, "")
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
        monkeypatch.setenv(variable, "garbage_collection_threshold:0.8")
        prefer_expandable_segments()
        assert not expects_expandable_segments()


def test_a_run_gets_what_is_expected_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    before = expects_expandable_segments()
    prefer_expandable_segments()
    assert expects_expandable_segments() is before
