"""Seeds: one number a run, and independent streams derived from it by name."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of run `seed`; the same on every machine and Python version.

    Hashing keeps streams independent: adding a stream never changes the numbers of another.
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
