"""What a lever does to a run, in words."""

from __future__ import annotations

from eightgig.core.units import format_bytes, format_duration


def trade_words(saves_bytes: int, costs_s: float | None) -> str:
    """What a lever does to memory and to the time of a step; either may be for the worse, or for the better."""
    memory = f"{'saves' if saves_bytes >= 0 else 'takes'} {format_bytes(abs(saves_bytes))}"
    if costs_s is None:
        return memory
    if costs_s == 0:
        return f"{memory}, costs no time"
    return f"{memory}, {'costs' if costs_s > 0 else 'saves'} {format_duration(abs(costs_s))} a step"
