"""`eightgig plan`: what a run will take of a card's memory, before anything is downloaded."""

from __future__ import annotations

import torch

from eightgig.config import TrainingConfig
from eightgig.core.units import GIB
from eightgig.plan.plan import Plan, plan
from eightgig.registry import resolve
from eightgig.registry.gpus import GpuFacts, get_gpu, gpu_of_vram


def plan_run(
    config: TrainingConfig, *, gpu: str | None = None, vram_gib: float | None = None, reserve_gib: float = 0.0
) -> Plan:
    """The plan of `config` on a card: the one named, one of `vram_gib`, else the one in this machine, else none.

    Raises:
        ConfigError: no card is called so, or a setting does not suit the model.
        UnsupportedModel: the model is unknown.
        EnvironmentProblem: the hub can't be reached, which models outside the registry need.
    """
    return plan(
        config,
        resolve(config.model.name, config.model.revision),
        _card(gpu, vram_gib),
        reserve_bytes=round(reserve_gib * GIB),
    )


def _card(gpu: str | None, vram_gib: float | None) -> GpuFacts | None:
    if gpu is not None:
        return get_gpu(gpu, vram_bytes=None if vram_gib is None else round(vram_gib * GIB))
    if vram_gib is not None:
        return gpu_of_vram(vram_gib)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return get_gpu(properties.name, vram_bytes=properties.total_memory)
    return None
