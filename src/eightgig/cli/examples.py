"""The examples at the end of each verb's help."""

from __future__ import annotations


def examples(*commands: str) -> str:
    """An epilog with one example a line (Typer joins lines that no blank one parts)."""
    return "\n\n".join(["Examples:", *commands])
