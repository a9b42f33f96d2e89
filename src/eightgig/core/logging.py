"""Logs go to stderr, through the standard library, so that stdout stays free for results."""

from __future__ import annotations

import logging

ROOT_LOGGER = "eightgig"


def get_logger(name: str) -> logging.Logger:
    """The logger of one module, below the package's own root logger."""
    return logging.getLogger(name if name.startswith(ROOT_LOGGER) else f"{ROOT_LOGGER}.{name}")
