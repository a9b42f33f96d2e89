"""What one call of the command knows about itself: whether to show tracebacks, and which run it is in."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from eightgig.core.logging import ROOT_LOGGER

_OTHER_PACKAGES = r"(transformers|peft|bitsandbytes|accelerate|torch|huggingface_hub)\b"


@dataclass
class Session:
    """Set by the options and by the verb as it goes; read by `entry` when something goes wrong.

    Attributes:
        debug: show the traceback of an unexpected error, and the package's own log.
        run_folder: the run that is being trained, once it has a folder.
    """

    debug: bool = False
    run_folder: Path | None = None


def is_main_process() -> bool:
    """Whether this is the process that speaks for all: the only one, or the first that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


class Stopped(Exception):
    """A signal stopped a run.

    Attributes:
        exit_code: 128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__()


def session_of(context: typer.Context) -> Session:
    """The session of this call."""
    return context.ensure_object(Session)


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn Ctrl-C, or a run's SIGTERM, into `Stopped`, which Typer lets through, so that `entry` says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(getattr(error, "signal_number", signal.SIGINT)) from error


def start_logging(*, debug: bool) -> None:
    """Send the package's log to stderr: warnings, and everything with `debug`; quieten what users can't act on.

    Must be called before the packages that it quietens are imported.
    """
    if not debug:
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=_OTHER_PACKAGES)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels that aren't installed
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are made of control characters, which spoil a log
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if debug else "%(message)s"))
    logger = logging.getLogger(ROOT_LOGGER)
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
