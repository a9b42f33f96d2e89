"""A listener that keeps what a run says, and can stop it."""

from __future__ import annotations

from typing import Any

from eightgig.train.events import SilentListener


class Listener(SilentListener):
    """Keeps the messages; stops after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.texts: list[str] = []
        self._stop_after = stop_after

    def on_message(self, text: str) -> None:
        self.texts.append(text)

    def on_step(self, record: Any) -> None:
        if record["step"] == self._stop_after:
            raise KeyboardInterrupt
