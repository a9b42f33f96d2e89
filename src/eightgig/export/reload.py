"""Program of the fresh process: load the result in plain transformers and peft, compare logits, write the outcome.

usage: python -m eightgig.export.reload PLAN.json REFERENCE.safetensors RESULT.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig

from eightgig import registry
from eightgig.config import HardwareConfig
from eightgig.core.files import write_json
from eightgig.export.reference import read_reference
from eightgig.export.verify import ReloadPlan, Verification
from eightgig.memory.cap import limit_allocator
from eightgig.models.fp32_islands import run_in_fp32
from eightgig.models.host_weights import keep_on_host, leaving_the_gpu
from eightgig.models.quantization import disable_cpu_repacking
from eightgig.models.random_weights import build_random
from eightgig.registry import ModelSpec
from eightgig.registry.facts import as_dicts


def main(arguments: list[str]) -> None:
    """Do what the module says; a failure ends the process with a traceback, which the parent shows."""
    plan_path, reference, result = (Path(argument) for argument in arguments)
    plan = ReloadPlan(**json.loads(plan_path.read_text(encoding="utf-8")))
    limit_allocator(torch.device(plan.device), plan.cap_gib)
    write_json(result, dataclasses.asdict(compare(plan, reference)))


def compare(plan: ReloadPlan, reference: Path) -> Verification:
    """Load the model of `plan` and compare it with the logits in `reference`."""
    model, how = load(plan)
    spec = _spec(plan)
    differences = _differences(model, plan, spec, reference)
    effect = None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            effect = _differences(model, plan, spec, reference)[1]
    return Verification(
        max_abs_difference=differences[0],
        relative_difference=differences[1],
        tolerance=plan.tolerance,
        adapter_effect=effect,
        ok=differences[1] <= plan.tolerance,  # False for NaN too
        how=how,
    )


def load(plan: ReloadPlan) -> tuple[Any, str]:
    """The model in eval mode, and one sentence on how it was loaded."""
    spec = _spec(plan)
    whose = "EightGig's own classes" if spec.family.has_own_classes else "plain transformers"
    if plan.base is None:
        model, _ = spec.family.load_model(plan.saved, **_load_arguments(plan, spec))
        return model.eval(), f"fresh process, {whose}: from_pretrained({plan.saved!r})"
    hardware = HardwareConfig(embedding_on_host=plan.embedding_on_host, streamed_layers=plan.streamed_layers)
    device = torch.device(plan.device)
    with leaving_the_gpu(hardware, spec, device) as packed:
        base, how = _load_base(plan, spec, whose, device)
    base.requires_grad_(False)
    if keep_on_host(hardware, spec, base, device, packed) is not None:
        how += f", {plan.streamed_layers} of its layers streamed by EightGig"
    if plan.embedding_on_host:
        how += ", its embeddings looked up in RAM"
    disable_cpu_repacking(base)  # so that a CPU with AVX512-BF16 compares with the kernels that trained
    if plan.fp32_modules:
        run_in_fp32(base, plan.fp32_modules)
        how += f", {', '.join(plan.fp32_modules)} in fp32"
    for path in plan.interpolated_towers:
        tower = base.get_submodule(path)
        tower.forward = functools.partial(tower.forward, interpolate_pos_encoding=True)
        how += ", the vision tower's positions interpolated"
    return PeftModel.from_pretrained(base, plan.saved).eval(), f"{how}, PeftModel.from_pretrained({plan.saved!r})"


def _load_base(plan: ReloadPlan, spec: ModelSpec, whose: str, device: torch.device) -> tuple[Any, str]:
    """The base model, and how it was loaded."""
    if plan.random_weights_seed is None:
        base, _ = spec.family.load_model(str(plan.base), revision=plan.revision, **_load_arguments(plan, spec))
        return base, f"fresh process, {whose} and peft: from_pretrained({plan.base!r})"
    base = build_random(
        spec,
        seed=plan.random_weights_seed,
        device=device,
        dtype=getattr(torch, plan.dtype),
        quantization_config=_quantization(plan),
    )
    return base, f"fresh process, peft; base model {plan.base} rebuilt with random weights {plan.random_weights_seed}"


def _spec(plan: ReloadPlan) -> ModelSpec:
    return registry.resolve(plan.base or plan.saved, plan.revision)


def _load_arguments(plan: ReloadPlan, spec: ModelSpec) -> dict[str, Any]:
    return {
        "dtype": getattr(torch, plan.dtype),
        "device_map": {"": plan.device},
        "attn_implementation": as_dicts(spec.family.attention),
        "quantization_config": _quantization(plan),
    }


def _quantization(plan: ReloadPlan) -> Any | None:
    return None if plan.quantization is None else BitsAndBytesConfig.from_dict(plan.quantization)


def _differences(model: Any, plan: ReloadPlan, spec: ModelSpec, reference: Path) -> tuple[float, float]:
    """Largest absolute difference of two logits, and norm of the difference over norm of the reference."""
    largest, squared_difference, squared_reference = 0.0, 0.0, 0.0
    for batch in read_reference(reference):
        logits = _logits(model, plan, spec, batch.inputs, batch.positions)
        difference = logits.double() - batch.logits.double()
        largest = max(largest, float(difference.abs().max()))
        squared_difference += float(difference.square().sum())
        squared_reference += float(batch.logits.double().square().sum())
    return largest, (squared_difference / squared_reference) ** 0.5


def _logits(model: Any, plan: ReloadPlan, spec: ModelSpec, inputs: Any, positions: Tensor) -> Tensor:
    moved = {
        name: tensor.to(plan.device, dtype=getattr(torch, plan.dtype) if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
    rows, columns = positions.to(plan.device).unbind(dim=1)
    with torch.no_grad():
        logits: Tensor = model(**spec.family.own_inputs(model, moved), use_cache=False).logits[rows, columns]
    return logits.float().cpu()


if __name__ == "__main__":
    main(sys.argv[1:])
