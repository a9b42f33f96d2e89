"""What is kept between calls: found again, bounded, and never in the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from eightgig.core.user_cache import JsonCache, cache_folder


def test_values_come_back_by_their_whole_key(tmp_path: Path) -> None:
    cache = JsonCache(tmp_path / "deep" / "plans", max_entries=10)
    key = {"config": {"rank": 8}, "gpu": ("RTX 4060", 8)}
    assert cache.get(key) is None
    cache.put(key, {"fits": True, "name": "ü"})
    assert cache.get({"gpu": ["RTX 4060", 8], "config": {"rank": 8}}) == {"fits": True, "name": "ü"}
    assert cache.get({**key, "config": {"rank": 16}}) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"key": {"a": 2}, "value": 3}'])
def test_a_damaged_entry_counts_as_none_and_is_made_anew(tmp_path: Path, content: bytes) -> None:
    cache = JsonCache(tmp_path, max_entries=10)
    cache.put({"a": 1}, 1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert cache.get({"a": 1}) is None
    cache.put({"a": 1}, 2)
    assert cache.get({"a": 1}) == 2


def test_the_last_used_entries_are_kept(tmp_path: Path) -> None:
    cache = JsonCache(tmp_path, max_entries=3)
    for number in range(3):
        cache.put({"n": number}, number)
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: json.loads(path.read_text())["value"])):
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.get({"n": 0}) == 0  # the oldest, used again
    cache.put({"n": 3}, 3)
    assert [cache.get({"n": number}) for number in range(4)] == [0, None, 2, 3]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = JsonCache(tmp_path / "file" / "plans", max_entries=3)
    cache.put({"a": 1}, 1)
    assert cache.get({"a": 1}) is None
    assert (tmp_path / "file").read_bytes() == b""


def test_where_caches_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "eightgig"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, the XDG specification says
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "home" / ".cache" / "eightgig"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "home" / "Library" / "Caches" / "eightgig"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "eightgig" / "cache"
