"""Does the saved result work without EightGig? A fresh process loads it in plain libraries and compares logits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eightgig.config import MixedPrecision, TrainingMethod
from eightgig.core.errors import CheckpointError
from eightgig.models.load import weight_dtype
from eightgig.models.quantization import quantization_config
from eightgig.registry.family import ModelSpec

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.models.precision import Precision

# Largest accepted norm of the difference over the norm of the reference. The same kernels on the same device give 0;
# this leaves room for other kernels' rounding (2^-8 for bf16 and 2^-11 for fp16 a step, over some tens of layers).
TOLERANCES = {MixedPrecision.FP32: 1e-4, MixedPrecision.FP16: 5e-3, MixedPrecision.BF16: 2e-2}

OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the base model was loaded just now: no outage may spoil the proof, no update either
TIMEOUT_S = 3600.0  # reading a 13B checkpoint from a slow disk takes many minutes
NUM_LAST_LINES = 12


@dataclass(frozen=True)
class ReloadPlan:
    """What the fresh process loads; plain data, handed over as JSON.

    Attributes:
        base: what `from_pretrained` is given for the base model, folder or hub id; None where `saved` is whole.
        random_weights_seed: where the base has random weights: their seed; it is then rebuilt, since it exists nowhere.
        saved: the folder of the adapter, or of the whole model.
        dtype: name of the torch dtype of pixel values and of weights that are not 4-bit.
        quantization: `BitsAndBytesConfig.to_dict()`, or None.
        interpolated_towers: paths of the towers whose positions must be interpolated on the fly.
        fp32_modules: patterns of paths of modules that must run in fp32 in a model of another dtype.
        cap_gib: limit of what PyTorch may reserve on the GPU.
        embedding_on_host, streamed_layers: as in the run, where the whole model need not fit the GPU.
    """

    base: str | None
    revision: str | None
    random_weights_seed: int | None
    saved: str
    dtype: str
    device: str
    quantization: dict[str, Any] | None
    interpolated_towers: tuple[str, ...]
    fp32_modules: tuple[str, ...]
    cap_gib: float | None
    tolerance: float
    embedding_on_host: bool = False
    streamed_layers: int = 0


@dataclass(frozen=True)
class Verification:
    """How the reloaded model's logits compare with the trained model's.

    Attributes:
        max_abs_difference: largest difference of two logits.
        relative_difference: norm of the difference over the norm of the trained model's logits.
        tolerance: the largest relative difference accepted.
        adapter_effect: relative difference without the adapter: what forgetting it would look like; None without one.
        ok: whether the relative difference is within the tolerance.
        how: one sentence on what was loaded, and with what.
    """

    max_abs_difference: float
    relative_difference: float
    tolerance: float
    adapter_effect: float | None
    ok: bool
    how: str


def reload_plan(
    config: TrainingConfig, spec: ModelSpec, device: torch.device, precision: Precision, saved: Path
) -> ReloadPlan:
    """What a fresh process must do to load `saved`, the result of the run that `config` describes."""
    is_full = config.training.method is TrainingMethod.FULL
    image_px = config.data.image_size
    # A model saved whole has its new image size in its config; a base model loaded anew does not.
    changes_px = image_px is not None and image_px != spec.facts.image_px
    interpolates = changes_px and spec.family.interpolates_positions and not is_full
    dtype = weight_dtype(config.training.method, device, precision)
    quantization = quantization_config(config, spec, device, precision)
    return ReloadPlan(
        base=None if is_full else spec.location,
        revision=config.model.revision if spec.facts.folder is None else None,
        random_weights_seed=None if is_full else config.model.random_weights_seed,
        saved=str(saved),
        dtype=_name(dtype),
        device=str(device),
        quantization=None if quantization is None else quantization.to_dict(),
        interpolated_towers=spec.family.modules.towers if interpolates else (),
        fp32_modules=spec.family.fp32_in_fp16 if dtype is torch.float16 else (),
        cap_gib=config.hardware.cap_gib if device.type == "cuda" else None,
        tolerance=TOLERANCES[precision.mixed_precision],
        embedding_on_host=config.hardware.levers.embedding_on_host,
        streamed_layers=config.hardware.levers.streamed_layers,
    )


def verify_in_fresh_process(plan: ReloadPlan, reference: Path, *, timeout_s: float = TIMEOUT_S) -> Verification:
    """Load what `plan` says in a new Python process and compare its logits with those in `reference`.

    The process needs as much GPU memory as inference does: give the trained model's back first.

    Raises:
        CheckpointError: the process failed; the message ends with the last lines it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="eightgig-verify-") as folder:
        plan_path, result_path = Path(folder) / "plan.json", Path(folder) / "result.json"
        plan_path.write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        command = [sys.executable, "-m", "eightgig.export.reload", str(plan_path), str(reference), str(result_path)]
        try:
            finished = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, env=os.environ | OFFLINE
            )
        except subprocess.TimeoutExpired as error:
            raise _failed(plan, f"did not end within {timeout_s:g} s", str(error.stderr or "")) from error
        if finished.returncode != 0:
            raise _failed(plan, f"ended with status {finished.returncode}", finished.stderr)
        return Verification(**json.loads(result_path.read_text(encoding="utf-8")))


def _failed(plan: ReloadPlan, how: str, output: str) -> CheckpointError:
    last = "\n    ".join([line for line in output.splitlines() if line.strip()][-NUM_LAST_LINES:])
    return CheckpointError(
        f"the process that loads {plan.saved} in plain libraries {how}:\n    {last}",
        expected="the saved result to load with transformers and peft alone",
        next_step="the training itself is done and saved; see the lines above for what is missing or damaged",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
