"""Events of a run, and a stand-in for the functions of `app`, for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import eightgig.app
from eightgig.cli.entry import run_command
from eightgig.train.events import RunOutcome, RunStart

PLAN: dict[str, Any] = {
    "model": "m",
    "method": "qlora",
    "gpu": "RTX 4060",
    "budget_bytes": 7 << 30,
    "fits": True,
    "peak": {"allocated_bytes": 5 << 30, "reserved_bytes": 6 << 30, "device_bytes": 13 << 29, "moment": "train"},
    "breakdown": {"4-bit weights": 6 << 30, "CUDA context": 1 << 29},
    "phases": {"load": 5 << 30, "validate": 6 << 30, "train": 13 << 29, "save": 13 << 29},
    "host_bytes": 0,
    "feature_bytes": 0,
    "workload": {
        "num_samples": 1,
        "num_images": 1,
        "num_tokens": 1088,
        "num_text_tokens": 512,
        "num_image_tokens": 576,
        "data": {
            "decided_by": "most tokens",
            "samples": ["chart-17 (train.jsonl:18)"],
            "num_train_samples": 950,
            "num_validation_samples": 50,
            "steps_an_epoch": 30,
            "mean_tokens": 701.25,
            "max_tokens": 1088,
            "notes": ["pictures were measured by their headers; training decodes every one before it begins"],
        },
    },
    "levers": [
        {"name": "chunked loss", "saves_bytes": 1 << 30, "costs_s": 0.125, "reason": "the logits would not fit"},
    ],
    "alternatives": [],
    "time": {"step_s": 9.5, "epoch_s": 285.0, "tokens_per_s": 2362.1, "basis": "estimated from the card's data sheet"},
    "config": {},
}
ALTERNATIVE: dict[str, Any] = {
    "settings": {"training.loss_chunk_tokens": 256, "data.max_length": 448},
    "device_bytes": 13 << 28,
    "step_s": 8.0,
    "price": "texts are cut at 448 tokens",
}
"""What a plan that does not fit names instead."""
RECEIPT_ROWS: tuple[dict[str, Any], ...] = (
    {"group": "language linears", "module_class": "Linear4bit", "num_modules": 224, "num_trainable": 0}
    | {"num_parameters": 6_476_005_376, "storage_dtype": "uint8", "is_4bit": True}
    | {"bytes_16bit": 12_952_010_752, "bytes_now": 3_339_190_272, "on_host": False},
    {"group": "vision tower", "module_class": "Linear", "num_modules": 145, "num_trainable": 0}
    | {"num_parameters": 303_507_456, "storage_dtype": "bfloat16", "is_4bit": False}
    | {"bytes_16bit": 607_014_912, "bytes_now": 607_014_912, "on_host": False},
)
RECEIPT: dict[str, Any] = {
    "model": "llava-1.5-7b",
    "asked": "nf4 with double quantisation in the language model's linear layers, 16-bit elsewhere",
    "rows": list(RECEIPT_ROWS),
    "mismatches": [],
    "num_parameters": 6_779_512_832,
    "num_trainable": 0,
    "bytes_16bit": 13_559_025_664,
    "bytes_now": 3_946_205_184,
    "tower_difference": None,
}
GENERATIONS: tuple[dict[str, Any], ...] = (
    {"step": 50, "sample_id": "a", "images": [], "question": "How tall is bar 3?", "expected": "7"}
    | {"answer": "7", "correct": True},
    {"step": 50, "sample_id": "b", "images": [], "question": "Which [red] bar is\nthe tallest of all those seen here?"}
    | {"expected": "the first one from the left", "answer": "a blue circle\nand a square", "correct": False},
)


def run_start(folder: Path, **changes: Any) -> RunStart:
    """A run that is about to begin."""
    facts: dict[str, Any] = {
        "run_folder": folder,
        "model": "llava-1.5-7b",
        "method": "qlora",
        "device": "cuda",
        "precision_note": None,
        "steps_planned": 400,
        "first_step": 1,
        "num_train_samples": 6400,
        "num_validation_samples": 200,
        "num_quarantined": 0,
        "num_cut_samples": 0,
        "num_trainable_parameters": 19_988_480,
        "num_parameters": 7_063_427_072,
        "receipt_rows": RECEIPT_ROWS,
    }
    return RunStart(**facts | changes)


def step_event(step: int, **changes: Any) -> dict[str, Any]:
    """An optimizer step, as a listener hears of it."""
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 200,
        "loss": 0.43125,
        "learning_rate": 1.8e-4,
        "grad_norm": 0.8215,
        "skipped": False,
        "step_s": 9.1,
        "data_wait_s": 0.455,
        "tokens_per_s": 3516.48,
        "images_per_s": 3.516,
        "memory_now_bytes": 4_900_000_000,
        "memory_peak_bytes": 5_600_000_000,
        "eta_s": 725.0,
        "steps_planned": 400,
    } | changes


VALIDATION = {"kind": "validation", "step": 50, "loss": 1.0725, "exact_match": 0.25, "num_generated": 8} | {
    "validation_s": 21.5
}


def run_outcome(folder: Path, **changes: Any) -> RunOutcome:
    """What a finished run ended with."""
    facts: dict[str, Any] = {
        "run_folder": folder,
        "adapter_folder": folder / "adapter",
        "report_path": folder / "report.html",
        "steps_done": 400,
        "status": "finished",
        "train_s": 1834.2,
        "final_loss": 0.15378,
        "exact_match_before": 0.0,
        "exact_match_after": 0.875,
        "verification": {"ok": True, "max_abs_difference": 0.0125},
        "peak": {"peak_reserved_bytes": 5_800_000_000, "host_peak_rss_bytes": 2_100_000_000},
    }
    return RunOutcome(**facts | changes)


class Calls:
    """Puts functions of its own in the place of `app`'s, and keeps what they were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.arguments: dict[str, Any] = {}

    def answer(self, module: str, name: str, act: Callable[..., Any]) -> None:
        """Let `eightgig.app.MODULE.NAME` call `act` with the keyword arguments that it gets."""

        def function(*positional: Any, **named: Any) -> Any:
            self.arguments = {"positional": positional, **named}
            return act(**named)

        self._monkeypatch.setattr(eightgig.app, module, SimpleNamespace(**{name: function}), raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command with `arguments`."""
    capsys.readouterr()
    code = run_command(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
