"""How long `eightgig plan` takes for LLaVA-1.5-7B on an RTX 4060: cold, and again from the plans that are kept.

usage: python -m benchmarks.plan_time --out RECORD.json                                                 (no GPU)
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_record

COMMAND = ("-m", "eightgig", "plan", "llava-1.5-7b", "--gpu", "RTX 4060")


def timed(kind: str, cache: str) -> dict[str, Any]:
    """Wall and CPU time of the command in a fresh process, whose user's cache is in the folder `cache`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *COMMAND], check=True, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": cache}
    )
    wall_s = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "kind": kind,
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    """Time it twice with one empty cache, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as cache:
        rows = [timed(kind, cache) for kind in ("cold", "warm")]
    print(rows)
    conditions = {"command": " ".join(COMMAND), "load_average_before": load_before}
    write_record(arguments.out, name="plan_time", figures={"rows": rows}, conditions=conditions)


if __name__ == "__main__":
    main()
