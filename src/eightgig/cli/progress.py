"""Which listener shows a run: a live one on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eightgig.cli.session import Session, is_main_process

if TYPE_CHECKING:
    from eightgig.train.events import TrainingListener


@contextmanager
def open_listener(session: Session) -> Iterator[TrainingListener]:
    """A listener for the run of this call, which leaves the terminal in order however the block ends."""
    from eightgig.cli.live_progress import LiveListener, stderr_console
    from eightgig.cli.plain_progress import PlainListener
    from eightgig.train.events import SilentListener

    if not is_main_process():
        yield SilentListener()
        return
    console = stderr_console()
    listener = LiveListener(session, console) if console.is_terminal else PlainListener(session, sys.stderr)
    try:
        yield listener
    finally:
        listener.close()
