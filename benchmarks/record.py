"""The shape of a measurement's record under `benchmarks/results/`: what ran, where, with what, and the figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "pillow")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that was measured; a machine without the repository's history is told it in EIGHTGIG_COMMIT."""
    told = os.environ.get("EIGHTGIG_COMMIT")
    if told:
        return told
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def device_facts() -> dict[str, Any]:
    """What the measurement ran on."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "type": "cuda",
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.processor()
    )
    return {"type": "cpu", "name": cpu, "cores": os.cpu_count()}


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def write_record(path: Path, *, name: str, figures: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Write the record of one measurement to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "device": device_facts(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "conditions": conditions,
        "figures": figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
