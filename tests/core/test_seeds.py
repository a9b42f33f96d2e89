"""Derived seeds are stable and independent."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from eightgig.core.seeds import derive_seed


def test_the_derivation_is_the_documented_hash() -> None:
    assert derive_seed(42, "order", 3) == int.from_bytes(hashlib.sha256(b"42/order/3").digest()[:8], "big") >> 1


@given(st.integers(0, 2**40), st.text(max_size=8), st.text(max_size=8))
def test_streams_differ_and_fit_torch(seed: int, one: str, other: str) -> None:
    first, second = derive_seed(seed, "a", one), derive_seed(seed, "b", other)
    assert 0 <= first < 2**63
    assert first != second
