"""The collector is paused inside, and as it was behind."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest

from eightgig.core.garbage import collector_paused, present_objects_kept


class _Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_left_as_it_was(is_enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        with contextlib.suppress(ValueError), collector_paused():
            assert not gc.isenabled()
            raise ValueError("in between")
        assert gc.isenabled() is is_enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_what_was_there_is_not_looked_at_and_what_is_new_is() -> None:
    old = weakref.ref(_Ring())
    with present_objects_kept():
        new = weakref.ref(_Ring())
        gc.collect()
        assert new() is None
        assert old() is not None
    gc.collect()
    assert old() is None


def test_an_inner_block_leaves_the_outer_one_as_it_is() -> None:
    old = weakref.ref(_Ring())
    with present_objects_kept():
        with present_objects_kept():
            pass
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None
