"""The phases of a planned run in words."""

from __future__ import annotations

PHASE_WORDS = {
    "load": "loading",
    "features": "computing image features",
    "validate": "validation",
    "train": "training",
    "save": "saving",
}


def phase_word(name: str) -> str:
    """What the phase `name` of a trace is called in a sentence; a name without a word of its own is one."""
    return PHASE_WORDS.get(name, name)
