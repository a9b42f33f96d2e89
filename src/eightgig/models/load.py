"""From the configuration to a model on the device, checked and frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from eightgig.config import MixedPrecision, TrainingMethod
from eightgig.core.errors import CheckpointError, DoesNotFit, UnsupportedModel
from eightgig.models.fp32_islands import run_in_fp32
from eightgig.models.precision import Precision
from eightgig.models.quantization import disable_cpu_repacking, quantization_config
from eightgig.models.random_weights import build_random
from eightgig.models.receipt import Receipt, make_receipt
from eightgig.registry.hub import explained_hub_errors

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

WEIGHT_FILES = ("*.safetensors", "*.bin")
MAX_NAMED_KEYS = 3


@dataclass
class LoadedModel:
    """A model on its device with what belongs to it.

    Attributes:
        model: the transformers model, or the PeftModel around it once adapters are attached (both libraries untyped).
        processor: the transformers processor, set to the configured image size.
        receipt: what the weights are stored as; renewed when adapters are attached.
    """

    model: Any
    processor: Any
    spec: ModelSpec
    receipt: Receipt
    precision: Precision
    device: torch.device


def load_model(config: TrainingConfig, spec: ModelSpec, device: torch.device, precision: Precision) -> LoadedModel:
    """The base model in eval mode on `device`, quantised as configured, with its processor and a checked receipt.

    All parameters are frozen, except for full fine-tuning: there everything but the towers is trainable (they stay
    frozen, as in LLaVA's recipe; a projector inside one is trained), and the weights are bf16 where bf16 is computed in
    on a GPU, else fp32, because a gradient scaler needs fp32 gradients and a CPU gains nothing.

    Raises:
        ConfigError: the configured image size does not suit the model.
        UnsupportedModel: weights are missing, or were not stored as asked.
        CheckpointError: a weights file is damaged.
        DoesNotFit: the device's memory does not hold the model.
        EnvironmentProblem: the hub can't be reached, or does not hand the model out.
    """
    image_px = config.data.image_size
    if image_px is not None:
        spec.family.check_image_px(spec.facts, image_px)
    quantization = quantization_config(config, spec, device, precision)
    dtype = weight_dtype(config.training.method, device, precision)
    with _explained_load_errors(config, spec, device):
        if config.model.random_weights_seed is not None:
            model = build_random(
                spec,
                seed=config.model.random_weights_seed,
                device=device,
                dtype=dtype,
                quantization_config=quantization,
            )
        else:
            model = _from_pretrained(config, spec, device, dtype, quantization)
        processor = load_processor(config, spec)
    disable_cpu_repacking(model)
    spec.family.apply_image_px(model, processor, image_px)
    if dtype is torch.float16:
        run_in_fp32(model, spec.family.fp32_in_fp16)
    model.config.get_text_config().use_cache = False  # generate asks for its cache itself
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    _freeze(model, spec, config.training.method)
    receipt = make_receipt(model, spec, config)
    receipt.check()
    return LoadedModel(model, processor, spec, receipt, precision, device)


def weight_dtype(method: TrainingMethod, device: torch.device, precision: Precision) -> torch.dtype:
    """The dtype of weights that are not 4-bit: the compute dtype where they are frozen; see `load_model` for full."""
    trains_in_bf16 = device.type == "cuda" and precision.mixed_precision is MixedPrecision.BF16
    if method is TrainingMethod.FULL and not trains_in_bf16:
        return torch.float32
    return precision.compute_dtype


def load_processor(config: TrainingConfig, spec: ModelSpec) -> Any:
    """The model's processor; a stand-in where the weights are random and there is no folder to read one from.

    Raises:
        UnsupportedModel: the folder lacks files of it, or the repository has none.
        EnvironmentProblem: the hub can't be reached, or does not hand the model out.
    """
    if config.model.random_weights_seed is not None and spec.facts.folder is None:
        return spec.family.build_processor(spec.facts)
    if spec.facts.folder is not None:
        _check_processor_files(spec.facts.folder, spec.family.processor_files)
    with explained_hub_errors(spec.location, config.model.revision):
        return spec.family.load_processor(spec.location, **_revision(config, spec))


def without_graph_when_frozen(module: nn.Module) -> None:
    """Make `module` run under no_grad whenever none of its parameters is trainable.

    Asked on each call, since adapters may be attached to it later. The instance's forward is wrapped, not the class's.
    """
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            return forward(*args, **kwargs)

    module.forward = wrapped


def _from_pretrained(
    config: TrainingConfig, spec: ModelSpec, device: torch.device, dtype: torch.dtype, quantization: Any | None
) -> Any:
    if spec.facts.folder is not None:
        _check_weights_exist(spec.facts.folder)
    model, loading = spec.family.load_model(
        spec.location,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        quantization_config=quantization,
        **_revision(config, spec),
    )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise UnsupportedModel(
            f"{spec.location} lacks {len(missing)} weights, among them {', '.join(missing[:MAX_NAMED_KEYS])}",
            expected=f"every weight of {type(model).__name__}",
            next_step="copy or download the model again; a shard may be missing, or the folder is of another model",
        )
    return model


def _revision(config: TrainingConfig, spec: ModelSpec) -> dict[str, str]:
    is_remote = spec.facts.folder is None and config.model.revision is not None
    return {"revision": str(config.model.revision)} if is_remote else {}


def _check_weights_exist(folder: Path) -> None:
    if any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        return
    raise UnsupportedModel(
        f"{folder} has a config.json but no weights",
        expected="model.safetensors, or its shards with model.safetensors.index.json",
        next_step="copy or download the model again, or try the size of it with --random-weights SEED",
    )


@contextlib.contextmanager
def _explained_load_errors(config: TrainingConfig, spec: ModelSpec, device: torch.device) -> Iterator[None]:
    try:
        with explained_hub_errors(spec.location, config.model.revision):
            yield
    except SafetensorError as error:
        raise CheckpointError(
            f"a weights file of {spec.location} is damaged: {error}",
            expected="complete safetensors files",
            next_step="copy or download the model again; the file was probably cut off",
        ) from error
    except torch.OutOfMemoryError as error:
        cap = config.hardware.cap_gib
        limit = f"the cap of {cap:g} GiB (hardware.cap_gib)" if cap is not None else f"the memory of {device}"
        raise DoesNotFit(
            f"{spec.name} does not fit into {limit}: it ran out while the weights were loaded",
            expected="room for the weights and some more for a training step",
            next_step="use load_in_4bit=true or a smaller model, close other programs on the GPU, or raise the cap",
        ) from error


def _check_processor_files(folder: Path, needed: Mapping[str, tuple[str, ...]]) -> None:
    """Raise UnsupportedModel unless a file of each kind is there; transformers would look at the hub."""
    for kind, names in needed.items():
        if not any((folder / name).is_file() for name in names):
            raise UnsupportedModel(
                f"{folder} has no {kind} ({' or '.join(names)})",
                expected="the processor's files beside the weights, as save_pretrained or `hf download` writes them",
                next_step="copy them from the model's own repository into the folder",
            )


def _freeze(model: Any, spec: ModelSpec, method: TrainingMethod) -> None:
    is_full = method is TrainingMethod.FULL
    paths = spec.family.modules
    model.requires_grad_(is_full)
    for path in paths.towers:
        tower = model.get_submodule(path)
        tower.requires_grad_(False)
        without_graph_when_frozen(tower)
    for path in paths.projectors:
        model.get_submodule(path).requires_grad_(is_full)
