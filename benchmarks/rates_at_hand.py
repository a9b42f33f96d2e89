"""What `eightgig plan` measures of a card at hand, several times over: how much it differs from time to time.

usage: python -m benchmarks.rates_at_hand --out RECORD.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.record import write_record

from eightgig.plan.card_rates import measure_rates, rates_as_json

NUM_TIMES = 5


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rates = [rates_as_json(measure_rates(torch.device("cuda"))) for _ in range(NUM_TIMES)]
    write_record(arguments.out, name="rates_at_hand", figures={"rates": rates}, conditions={})


if __name__ == "__main__":
    main()
