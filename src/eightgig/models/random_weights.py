"""Full-size models with random weights, built on the device without a checkpoint: for benchmarks and self-tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.quantizers import AutoHfQuantizer

from eightgig.core.seeds import derive_seed
from eightgig.registry.facts import as_dicts

if TYPE_CHECKING:
    from eightgig.registry import ModelSpec

# Llama's and CLIP's initializer_range (transformers' configs): activations stay finite in 16 bits at any depth.
STANDARD_DEVIATION = 0.02

Fill = Callable[[nn.Parameter, str], nn.Parameter]


def build_random(
    spec: ModelSpec, *, seed: int, device: torch.device, dtype: torch.dtype, quantization_config: Any | None
) -> Any:
    """The transformers model of `spec` with random weights, as `from_pretrained` would return it.

    Each weight is drawn on `device` from a seed of its own and, where it belongs to a 4-bit layer, quantised at once,
    so that no more than one such weight exists in 16 bits. The same seed gives the same weights on the same kind of
    device, whatever the quantisation.

    Args:
        spec: the model.
        seed: the run's seed for random weights.
        device: where the weights are drawn and stay.
        dtype: of everything that is not 4-bit.
        quantization_config: a `BitsAndBytesConfig`, or None for no 4-bit weights.
    """

    def fill(parameter: nn.Parameter, name: str) -> nn.Parameter:
        return _filled(parameter, name, seed, device, dtype)

    return build_filled(spec, fill, device=device, dtype=dtype, quantization_config=quantization_config)


def build_filled(
    spec: ModelSpec, fill: Fill, *, device: torch.device, dtype: torch.dtype, quantization_config: Any | None
) -> Any:
    """The transformers model of `spec`, each parameter being what `fill` makes of its place on meta and its name."""
    # Buffers are not part of a checkpoint: the constructor computes them for real, on the CPU, as transformers does.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(
            spec.family.build_config(spec.facts), dtype=dtype, attn_implementation=as_dicts(spec.family.attention)
        )
    quantizer = None
    if quantization_config is not None:
        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": device}, dtype=dtype)
    model.tie_weights()  # so that a tied head is not filled beside the embeddings
    _fill(model, fill, device)
    model.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    model.name_or_path = spec.location
    return model.eval()


def random_tensor(name: str, shape: Sequence[int], *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight `name` of the random model `seed`: biases 0, norms 1, all else normal with standard deviation 0.02."""
    values = torch.empty(tuple(shape), device=device, dtype=dtype)
    if name.endswith("bias"):
        return values.zero_()
    if name.endswith("weight") and len(shape) == 1:  # of the stock layers only norms have one-dimensional weights
        return values.fill_(1.0)
    generator = torch.Generator(device).manual_seed(derive_seed(seed, name))
    return values.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _fill(model: nn.Module, fill: Fill, device: torch.device) -> None:
    done: set[int] = set()  # tied weights are one parameter under two names; the first one fills it
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            setattr(module, name, fill(parameter, f"{path}.{name}" if path else name))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _filled(parameter: nn.Parameter, name: str, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """The random weight in place of `parameter` on meta; its 16-bit values are freed on return if it is 4-bit."""
    # A 4-bit layer on meta has its weight's own shape until it is quantised.
    values = random_tensor(name, parameter.shape, seed=seed, device=device, dtype=dtype)
    if isinstance(parameter, bnb.nn.Params4bit):
        quantised: nn.Parameter = bnb.nn.Params4bit(values, requires_grad=False, **parameter.__dict__).to(device)
        return quantised
    return nn.Parameter(values, requires_grad=False)
