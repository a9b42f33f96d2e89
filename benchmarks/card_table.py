"""The table of cards and models, as `eightgig plan --matrix --json` makes it, kept as a record.

usage: python -m benchmarks.card_table --out RECORD.json [--models NAME ...]                            (no GPU)

Without `--models` of all that are known by name.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.record import write_record

from eightgig import registry
from eightgig.app.gpu_matrix import matrix


def main() -> None:
    """Make the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+")
    arguments = parser.parse_args()
    specs = None if arguments.models is None else [registry.get(name) for name in arguments.models]
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    made = matrix(specs, on_progress=lambda text: print(text, flush=True))
    conditions = {"wall_s": time.perf_counter() - started_s, "cpu_s": time.process_time() - started_cpu_s}
    write_record(arguments.out, name="card_table", figures=made.to_json(), conditions=conditions)


if __name__ == "__main__":
    main()
