"""The step that a config asks for, and the levers on the model that it is built around."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from eightgig.core.errors import ConfigError, Problem
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.host_copies import Transfers
from eightgig.memory.layer_inputs import offload_layer_inputs
from eightgig.memory.row_groups import compute_in_groups
from eightgig.memory.tiled_mlp import tile_mlps
from eightgig.models.fused_lora import fuse_lora
from eightgig.models.load import weight_dtype
from eightgig.models.precision import Precision
from eightgig.models.trainable import trainable_parameters
from eightgig.step.optimizer import build_optimizer, build_scheduler
from eightgig.step.step import Compute, SumOverProcesses, TrainingStep

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

CHECKPOINTED_LAYERS, MLP_TILE_TOKENS = "hardware.checkpointed_layers", "hardware.mlp_tile_tokens"


def checkpoint_as_configured(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> None:
    """Wrap decoder layers of `model` with activation checkpointing where `config` asks for it.

    The first ones are checkpointed and the last ones stay whole: what these keep is freed first in the backward pass,
    before a layer is computed again on top of it.

    Raises:
        ConfigError: more layers are asked for than the model has.
    """
    if config.hardware.gradient_checkpointing:
        layers = _checkpointed_layers(config, spec, model)
        checkpoint_layers(model, layers, preserve_rng_state=_has_dropout(config))


def tile_as_configured(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> None:
    """Have the MLPs of the decoder layers of `model`, and what is around attention, take some tokens at a time where
    `config` asks for it.

    Raises:
        ConfigError: a layer has no MLP that could be told.
    """
    tile_tokens = config.hardware.levers.mlp_tile_tokens
    if tile_tokens is None:
        return
    layers = spec.family.decoder_layers(model)
    mlps = [mlp for mlp in map(spec.family.mlp, layers) if mlp is not None]
    if len(mlps) < len(layers):
        allowed = f"null: decoder layers of {spec.name} have no MLP that can be told from the rest of them"
        raise ConfigError(
            [Problem(MLP_TILE_TOKENS, str(tile_tokens), allowed)],
            source="tiles",
            next_step=f"leave {MLP_TILE_TOKENS} out",
        )
    around = [each for layer in layers for each in spec.family.projections(layer)]
    tiled = [*mlps, *around] if config.hardware.tiled_projections else mlps
    tile_mlps(tiled, tile_tokens, preserve_rng_state=_has_dropout(config))


def offload_as_configured(
    config: TrainingConfig, spec: ModelSpec, model: nn.Module, transfers: Transfers | None = None
) -> None:
    """Have the inputs of the layers that `checkpoint_as_configured` wrapped wait on the host, if `config` asks for it.

    Wrap the layers with nothing afterwards but groups of rows: it acts on what the layer as a whole keeps.
    """
    if config.hardware.levers.offload_layer_inputs:
        offload_layer_inputs(_checkpointed_layers(config, spec, model), transfers)


def fuse_lora_as_configured(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> None:
    """Have the adapters of the decoder layers of `model` that share an input computed together, if `config` asks for
    it; before anything else wraps a forward.
    """
    if not config.hardware.fused_lora or config.training.lora is None:
        return
    tiles_projections = config.hardware.levers.mlp_tile_tokens is not None and config.hardware.tiled_projections
    for layer in spec.family.decoder_layers(model):
        shared = spec.family.linears_of_one_input(layer)
        if tiles_projections:  # each of them goes through all of its tiles by itself
            alone = set(spec.family.projections(layer))
            shared = [group for group in shared if alone.isdisjoint(group)]
        fuse_lora(layer, shared)


def why_not_fused(config: TrainingConfig, precision: Precision) -> str | None:
    """Why `hardware.fused_lora` changes nothing in a run of `config`; None where it acts, or is not asked for."""
    if not config.hardware.fused_lora:
        return None
    if config.training.lora is None:
        return "training.method full has no adapters"
    if _has_dropout(config):
        return f"training.lora.dropout is {config.training.lora.dropout:g}, which PEFT's own code computes"
    if precision.compute_dtype is torch.float16:
        return "adapters compute in fp32 where the rest computes in fp16"
    return None


def group_rows_as_configured(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> None:
    """Have the decoder layers of `model` take a micro-batch's rows at a time, if `config` puts several in a pass.

    Outermost of all: what else wraps a layer acts on each group of rows as it would on a micro-batch of its own.
    """
    if config.hardware.levers.micro_batches_per_pass > 1:
        layers, dimensions = spec.family.decoder_layers(model), spec.family.layer_row_dimensions
        compute_in_groups(layers, config.training.batch_size, row_dimensions=dimensions)


def _checkpointed_layers(config: TrainingConfig, spec: ModelSpec, model: nn.Module) -> list[nn.Module]:
    layers = list(spec.family.decoder_layers(model))
    wanted = config.hardware.levers.checkpointed_layers
    if wanted is not None and wanted > len(layers):
        raise ConfigError(
            [Problem(CHECKPOINTED_LAYERS, str(wanted), f"at most the {len(layers)} decoder layers of {spec.name}")],
            source="checkpointing",
            next_step=f"lower {CHECKPOINTED_LAYERS}, or set it to null to checkpoint all layers",
        )
    return layers[:wanted]


def _has_dropout(config: TrainingConfig) -> bool:
    return config.training.lora is not None and config.training.lora.dropout > 0


def build_compute(config: TrainingConfig, device: torch.device, precision: Precision) -> Compute:
    """How a forward pass of `config` runs on `device`: autocast only where weights are kept wider than they compute."""
    dtype = weight_dtype(config.training.method, device, precision)
    compute_dtype = precision.compute_dtype
    return Compute(
        device=device,
        input_dtype=dtype,
        autocast_dtype=None if dtype == compute_dtype else compute_dtype,
        loss_chunk_tokens=config.training.loss_chunk_tokens,
    )


def build_step(
    config: TrainingConfig,
    spec: ModelSpec,
    model: nn.Module,
    compute: Compute,
    *,
    num_steps: int,
    optimizer_device: torch.device | None = None,
    sum_over_processes: SumOverProcesses | None = None,
) -> TrainingStep:
    """The step over `model`, with the optimizer and the schedule of `config` over `num_steps` steps.

    `optimizer_device` is the one whose optimizer `auto` means; by default that of `compute`.
    """
    trainable = trainable_parameters(model)
    optimizer = build_optimizer(config.training, trainable.values(), optimizer_device or compute.device)
    is_fp16 = (compute.autocast_dtype or compute.input_dtype) is torch.float16
    return TrainingStep(
        model=model,
        family=spec.family,
        compute=compute,
        trainable=trainable,
        optimizer=optimizer,
        scheduler=build_scheduler(config.training, optimizer, num_steps),
        max_grad_norm=config.training.max_grad_norm,
        scaler=torch.amp.GradScaler(compute.device.type) if is_fp16 else None,
        sum_over_processes=sum_over_processes,
    )
