"""From the configuration to a model on the device, checked and frozen."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from torch import nn

from eightgig.config import MixedPrecision, TrainingMethod
from eightgig.core.errors import CheckpointError, DoesNotFit, UnsupportedModel
from eightgig.core.logging import get_logger
from eightgig.memory.cached_tower import tower_of
from eightgig.memory.streaming import StreamedWeights
from eightgig.models.fp32_islands import run_in_fp32
from eightgig.models.host_weights import keep_on_host, leaving_the_gpu
from eightgig.models.precision import Precision
from eightgig.models.quantization import disable_cpu_repacking, quantization_config
from eightgig.models.random_weights import build_random
from eightgig.models.receipt import Receipt, make_receipt
from eightgig.registry.facts import as_dicts
from eightgig.registry.hub import explained_hub_errors, must_use_cache

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

WEIGHT_FILES = ("*.safetensors", "*.bin")
JSON_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
MAX_NAMED_KEYS = 3

logger = get_logger(__name__)


@dataclass
class LoadedModel:
    """A model on its device with what belongs to it.

    Attributes:
        model: the transformers model, or the PeftModel around it once adapters are attached (both libraries untyped).
        processor: the transformers processor, set to the configured image size.
        receipt: what the weights are stored as; renewed when adapters are attached.
        streamed: weights that come from host memory when they are due; None without such.
    """

    model: Any
    processor: Any
    spec: ModelSpec
    receipt: Receipt
    precision: Precision
    device: torch.device
    streamed: StreamedWeights | None = None


def load_model(
    config: TrainingConfig,
    spec: ModelSpec,
    device: torch.device,
    precision: Precision,
    *,
    tower_on_host: bool = False,
) -> LoadedModel:
    """The base model in eval mode on `device`, quantised as configured, with its processor and a checked receipt.

    All parameters are frozen, except for full fine-tuning: there everything but the towers is trainable (they stay
    frozen, as in LLaVA's recipe; a projector inside one is trained), and the weights are bf16 where bf16 is computed in
    on a GPU, else fp32, because a gradient scaler needs fp32 gradients and a CPU gains nothing.

    `tower_on_host`: the tower whose features are kept lies on the CPU, its weights having left `device` one by one.

    Raises:
        ConfigError: the configured image size does not suit the model, or what is to stay on the host can't.
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
    with (
        _explained_load_errors(config, spec, device),
        leaving_the_gpu(config.hardware, spec, device, with_tower=tower_on_host) as packed,
    ):
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
    if tower_on_host:
        tower_of(model, spec.family).to("cpu")  # its buffers, and what else of 4-bit weights has stayed
    prepare_model(model, processor, spec, config, dtype)
    streamed = keep_on_host(config.hardware, spec, model, device, packed)
    receipt = make_receipt(model, spec, config)
    receipt.check()
    return LoadedModel(model, processor, spec, receipt, precision, device, streamed)


def prepare_model(model: Any, processor: Any, spec: ModelSpec, config: TrainingConfig, dtype: torch.dtype) -> None:
    """Make a model as it was built or loaded in `dtype` ready to train: image size, fp32 islands, what is frozen."""
    disable_cpu_repacking(model)
    spec.family.apply_image_px(model, processor, config.data.image_size)
    if dtype is torch.float16:
        run_in_fp32(model, spec.family.fp32_in_fp16)
    model.config.get_text_config().use_cache = False  # generate asks for its cache itself
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    _freeze(model, spec, config.training.method)


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
        return spec.family.load_processor(spec.location, **_hub_arguments(config, spec))


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
    hub_arguments = _hub_arguments(config, spec)
    model, loading = spec.family.load_model(
        spec.location,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=as_dicts(spec.family.attention),
        quantization_config=quantization,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        **hub_arguments,
        # transformers also looks for an adapter among the model's files, with arguments of its own.
        adapter_kwargs=hub_arguments,
    )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random values in their place
        raise UnsupportedModel(
            f"{spec.location} lacks {len(missing)} weights, among them {', '.join(missing[:MAX_NAMED_KEYS])}",
            expected=f"every weight of {type(model).__name__}",
            next_step="copy or download the model again; a shard may be missing, or the folder is of another model",
        )
    for name, shape, expected in sorted(loading["mismatched_keys"]):
        raise _other_shapes(spec, f"{name} has the shape {tuple(shape)}, not {tuple(expected)}")
    _check_layer_shapes(model, spec)
    unused = sorted(loading["unexpected_keys"])
    if unused:
        named = ", ".join(unused[:MAX_NAMED_KEYS])
        logger.warning("%d weights of %s have no place in the model: %s", len(unused), spec.location, named)
    return model


def _hub_arguments(config: TrainingConfig, spec: ModelSpec) -> dict[str, Any]:
    """What `from_pretrained` is told about a model of the hub; nothing for a local folder."""
    if spec.facts.folder is not None:
        return {}
    revision = config.model.revision
    arguments: dict[str, Any] = {"local_files_only": must_use_cache(spec.location, revision)}
    return arguments if revision is None else arguments | {"revision": revision}


def _check_weights_exist(folder: Path) -> None:
    if any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        return
    raise UnsupportedModel(
        f"{folder} has a config.json but no weights",
        expected="model.safetensors, or its shards with model.safetensors.index.json",
        next_step="copy or download the model again, or try the size of it with --random-weights SEED",
    )


def _check_layer_shapes(model: nn.Module, spec: ModelSpec) -> None:
    """Raise UnsupportedModel where a weight has not its layer's shape.

    transformers 5.23 checks all but 4-bit weights; 5.17 checks none when it quantises.
    """
    wrong = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = (module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            expected = (module.num_embeddings, module.embedding_dim)
        else:
            continue
        is_4bit = isinstance(module, bnb.nn.Linear4bit) and module.weight.quant_state is not None
        shape = tuple(module.weight.quant_state.shape if is_4bit else module.weight.shape)
        if shape != expected:
            wrong.append(f"{path}.weight has the shape {shape}, not {expected}")
    if wrong:
        raise _other_shapes(spec, min(wrong))


def _other_shapes(spec: ModelSpec, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of {spec.location} do not fit its config.json: {what}",
        expected="weights and config.json of the same model",
        next_step="copy or download the model's files again, all from one place",
    )


@contextlib.contextmanager
def _explained_load_errors(config: TrainingConfig, spec: ModelSpec, device: torch.device) -> Iterator[None]:
    try:
        with explained_hub_errors(spec.location, config.model.revision):
            yield
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{spec.location} is not complete: {error}",
            expected="every file that its index (model.safetensors.index.json) names",
            next_step="copy or download the model again; a shard is missing",
        ) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"a weights file of {spec.location} is damaged: {error}",
            expected="complete safetensors files",
            next_step="copy or download the model again; the file was probably cut off",
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:  # torch's own text tells how to have the file run its code
        raise CheckpointError(
            f"a .bin file of {spec.location} holds something else than tensors, or is cut off; nothing of it was run",
            expected="weights as safetensors, or .bin files that hold tensors and nothing else",
            next_step="download the model again, or take a version of it that has safetensors",
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
    for name in JSON_FILES:
        _check_json(folder / name)


def _check_json(path: Path) -> None:
    """Raise CheckpointError where `path` is there and no JSON; the libraries that read it tell this in many ways."""
    try:
        if path.is_file() and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no object")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise CheckpointError(
            f"{path} is damaged: {error}",
            expected="complete JSON, as save_pretrained or `hf download` writes it",
            next_step="copy the file again from the model's own repository",
        ) from error


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
