"""Memory between blocks that are still in use goes back to the system."""

from __future__ import annotations

import ctypes
import sys

import pytest
from benchmarks.load_memory import anonymous_bytes

from eightgig.memory.freed_memory import give_back_freed_memory

BLOCK_BYTES = 2**20
NUM_BLOCKS = 64


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc and glibc")
def test_holes_in_the_heap_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(8 * BLOCK_BYTES))  # from here on blocks of up to this size come from the heap
    blocks = [libc.malloc(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK_BYTES)
    for block in blocks[:-1]:  # the last one is in the way of what glibc gives back by itself
        libc.free(block)
    held_bytes = anonymous_bytes("self")
    give_back_freed_memory()
    assert held_bytes - anonymous_bytes("self") > (NUM_BLOCKS - 4) * BLOCK_BYTES
    libc.free(blocks[-1])
