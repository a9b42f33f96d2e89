"""Thousands of damaged pictures and JSONL lines, read, checked and encoded: nothing may crash, hang or swell.

usage: python -m benchmarks.fuzz_data --images 10000 --lines 10000 --out benchmarks/results/fuzz_data.json

Each batch runs in a process of its own, which reports what became of every input and the most memory it ever held. A
batch that dies or takes longer than LIMIT_S is counted, with its seeds, and ends the program with code 1.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fuzz_inputs import SHAPES, fuzzed_image, fuzzed_line, good_record
from benchmarks.record import write_record

IMAGES_A_BATCH, LINES_A_BATCH = 2000, 2000  # loading transformers takes longer than a thousand inputs
LIMIT_S = 600.0
ACCEPTED = "accepted"


def run_batch(kind: str, first_seed: int, num: int) -> dict[str, Any]:
    """What became of the inputs with the seeds from `first_seed` on, by quarantine code, or "accepted"."""
    from tests.tiny import build_tiny_processor

    from eightgig.data.encode import Encoder
    from eightgig.registry.llava import LlavaFamily

    warnings.simplefilter("ignore")  # Pillow says what it finds odd in the files
    encoder = Encoder(build_tiny_processor(), LlavaFamily(), max_length=4096)
    baseline_bytes = _peak_rss_bytes()
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        become = (_images if kind == "images" else _lines)(Path(folder), encoder, range(first_seed, first_seed + num))
    return {
        "become": become,
        "wall_s": time.perf_counter() - started_s,
        "baseline_rss_bytes": baseline_bytes,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _images(folder: Path, encoder: Any, seeds: range) -> Counter[str]:
    damages = Counter[str]()
    records = []
    for seed in seeds:
        damage, content = fuzzed_image(seed)
        damages[f"made: {damage}"] += 1
        (folder / f"{seed}.png").write_bytes(content)  # whatever it is: what counts is the content
        records.append({"image": f"{seed}.png", "caption": "x"})
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return damages + _become(folder, encoder)


def _lines(folder: Path, encoder: Any, seeds: range) -> Counter[str]:
    (folder / "a.png").write_bytes(_small_png())
    shape = SHAPES[seeds.start // LINES_A_BATCH % len(SHAPES)]
    first = json.dumps(good_record(shape, random.Random(0))).encode()  # tells the file's shape
    lines = [first, *(fuzzed_line(seed, shape) for seed in seeds)]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return _become(folder, encoder)


def _small_png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (12, 12)).save(buffer, format="PNG")
    return buffer.getvalue()


def _become(folder: Path, encoder: Any) -> Counter[str]:
    """What becomes of the records of `folder / "train.jsonl"`, every accepted one encoded as for training."""
    from eightgig.data.check import check_samples
    from eightgig.data.quarantine import Quarantine
    from eightgig.data.sources import load_samples

    quarantine = Quarantine(folder / "quarantine.jsonl")
    samples = load_samples(folder / "train.jsonl", None, quarantine)
    report = check_samples(samples, encoder, quarantine, max_bad_fraction=1.0)
    for sample in report.samples:
        encoder.encode(sample)
    written = map(json.loads, filter(None, quarantine.path.read_text(encoding="utf-8").split("\n")))
    become = Counter(str(record["code"]) for record in written)
    become[ACCEPTED] = len(report.samples)
    return become


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(kind: str, first_seed: int, num: int) -> dict[str, Any]:
    """`run_batch` in a fresh process; `failed` says how it ended where it did not end well."""
    command = [sys.executable, "-m", "benchmarks.fuzz_data", "--batch", kind, str(first_seed), str(num)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"hung: longer than {LIMIT_S:g} s", "first_seed": first_seed, "num": num}
    if ended.returncode != 0:
        return {"failed": ended.stderr[-3000:], "first_seed": first_seed, "num": num}
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def summary(kind: str, num: int, size: int) -> dict[str, Any]:
    """All batches of `num` inputs of a kind, `size` in each."""
    batches = []
    for first in range(0, num, size):
        batches.append(in_own_process(kind, first, min(size, num - first)))
        print(f"{kind} {first} to {min(first + size, num)}: {batches[-1].get('failed', 'done')}", file=sys.stderr)
    whole = [batch for batch in batches if "failed" not in batch]
    failed = [batch for batch in batches if "failed" in batch]
    become = sum((Counter(batch["become"]) for batch in whole), Counter[str]())
    made = {name.removeprefix("made: "): count for name, count in become.items() if name.startswith("made: ")}
    fates = {name: count for name, count in become.items() if not name.startswith("made: ")}
    return {
        "inputs": num,
        "crashes_or_hangs": len(failed),
        "failed": failed,
        "accepted": fates.pop(ACCEPTED, 0),
        "quarantined": sum(fates.values()),
        "quarantined_by_code": dict(sorted(fates.items())),
        "made": dict(sorted(made.items())),
        "slowest_batch_s": max((batch["wall_s"] for batch in whole), default=None),
        "baseline_rss_bytes": max((batch["baseline_rss_bytes"] for batch in whole), default=None),
        "peak_rss_bytes": max((batch["peak_rss_bytes"] for batch in whole), default=None),
    }


def main() -> None:
    """Run all batches and write the record; with --batch, one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", nargs=3, metavar=("KIND", "FIRST_SEED", "NUM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch is not None:
        kind, first, num = arguments.batch
        print(json.dumps(run_batch(kind, int(first), int(num))))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    figures = {
        "images": summary("images", arguments.images, IMAGES_A_BATCH),
        "lines": summary("lines", arguments.lines, LINES_A_BATCH),
    }
    conditions = {"images_a_batch": IMAGES_A_BATCH, "lines_a_batch": LINES_A_BATCH, "limit_s": LIMIT_S}
    write_record(arguments.out, name="fuzz_data", figures=figures, conditions=conditions)
    print(
        json.dumps({kind: {k: v for k, v in row.items() if k != "failed"} for kind, row in figures.items()}, indent=1)
    )
    if any(row["failed"] for row in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
