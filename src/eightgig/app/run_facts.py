"""What run.json says about a run: when, with what, on what, and how much of it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from eightgig import __version__
from eightgig.models.adapters import adapted_layers
from eightgig.train.run import Run

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors", "pillow")


def now_utc() -> str:
    """The time now, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def facts_at_start(run: Run) -> dict[str, Any]:
    """The facts that are known before the first step."""
    receipt = run.loaded.receipt
    precision = run.loaded.precision
    return {
        "eightgig_version": __version__,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": device_facts(run.step.compute.device),
        "precision": {"compute_dtype": str(precision.compute_dtype).removeprefix("torch."), "note": precision.note},
        "num_processes": run.accelerator.num_processes,
        "steps_planned": run.num_steps,
        "adapted_layers": adapted_layers(run.model),
        "num_trainable_parameters": receipt.num_trainable,
        "num_parameters": receipt.num_parameters,
        "num_train_samples": len(run.data.train),
        "num_validation_samples": len(run.data.validation),
        "num_quarantined": run.data.num_quarantined,
        "num_cut_prompt_samples": run.data.num_cut_prompt_samples,
        "num_cut_answer_samples": run.data.num_cut_answer_samples,
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and size of the device; a CPU has no memory of its own to speak of."""
    if device.type != "cuda":
        return {"type": device.type, "name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }
