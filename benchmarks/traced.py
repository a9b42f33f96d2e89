"""`eightgig` with its command line, the CUDA allocator's events recorded: python -m benchmarks.traced OUT.npz train ...

OUT.npz holds, in the order of the events, `action` (see ACTIONS), `address` and `size` in bytes, from the first
allocation to the end of training (before the result is proved in another process), and with TRACE_STACKS=1 the
innermost frames of each as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import eightgig.app.finishing as finishing
from eightgig.cli import main

ACTIONS = {"alloc": 0, "free_completed": 1, "segment_alloc": 2, "segment_free": 3, "segment_map": 4, "segment_unmap": 5}
MAX_EVENTS = 4_000_000
NUM_FRAMES = 4


def _save(path: Path, with_stacks: bool) -> None:
    events = [event for event in torch.cuda.memory._snapshot()["device_traces"][0] if event["action"] in ACTIONS]
    arrays: dict[str, Any] = {
        "action": np.array([ACTIONS[event["action"]] for event in events], dtype=np.uint8),
        "address": np.array([event["addr"] for event in events], dtype=np.uint64),
        "size": np.array([event["size"] for event in events], dtype=np.int64),
    }
    if with_stacks:
        stacks = [
            [f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in event.get("frames", [])[:NUM_FRAMES]]
            for event in events
        ]
        arrays["frames"] = np.array(json.dumps(stacks))
    np.savez_compressed(path, **arrays)


def run() -> None:
    """Record, then hand over to the command line."""
    path, with_stacks = Path(sys.argv[1]), os.environ.get("TRACE_STACKS") == "1"
    torch.cuda.memory._record_memory_history(
        context="alloc" if with_stacks else None, stacks="python", max_entries=MAX_EVENTS
    )
    save_and_prove = finishing._save_and_prove

    def traced(*arguments: Any) -> Any:
        _save(path, with_stacks)
        torch.cuda.memory._record_memory_history(enabled=None)
        return save_and_prove(*arguments)

    finishing._save_and_prove = traced
    sys.argv = ["eightgig", *sys.argv[2:]]
    main()


if __name__ == "__main__":
    run()
