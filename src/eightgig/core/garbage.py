"""Python's collector of cyclic garbage, kept away where much is made and nothing is thrown away."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, no garbage is looked for: while modules load or a model is built there is hardly any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def present_objects_kept() -> Iterator[None]:
    """Inside, garbage is looked for among what is made there alone, not among all that lives already.

    Within another such block it does nothing: what lives where that begins stays away until it ends.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
