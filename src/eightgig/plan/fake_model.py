"""A model of full size without a byte of weights: fake tensors in the places where training has real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from eightgig.models.adapters import peft_config, target_pattern
from eightgig.models.load import prepare_model, weight_dtype
from eightgig.models.precision import Precision
from eightgig.models.quantization import quantization_config
from eightgig.models.random_weights import build_filled
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import MemoryTrace

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

CPU = torch.device("cpu")  # where fake tensors claim to lie: a build of torch without CUDA aborts on a fake GPU
CUDA = torch.device("cuda")  # where the planned run lies; only its name is asked for


def build_fake(
    config: TrainingConfig, spec: ModelSpec, processor: Any, precision: Precision, recorder: Recorder
) -> Any:
    """The model of `config` as training has it, with its adapters; the allocations of its loading go to `recorder`."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = weight_dtype(config.training.method, CUDA, precision)
    _know_state_codes()
    loading = recorder.ledger
    assert isinstance(loading, MemoryTrace)

    def fill(parameter: nn.Parameter, name: str) -> nn.Parameter:
        with fakes, recorder:
            values = torch.empty(tuple(parameter.shape), dtype=dtype)
            is_4bit = isinstance(parameter, bnb.nn.Params4bit)
            filled: Any = _quantised(parameter, values) if is_4bit else _frozen(values)
            del values
        filled.arrived_event = len(loading)  # `plan.host_weights` lets some of them leave the GPU then
        weight: nn.Parameter = filled
        return weight

    quantization = quantization_config(config, spec, CPU, precision)
    model = build_filled(spec, fill, device=CPU, dtype=dtype, quantization_config=quantization)
    prepare_model(model, processor, spec, config, dtype)
    lora = config.training.lora
    if lora is None:
        return model
    model = get_peft_model(model, peft_config(lora, target_pattern(lora, spec), None), low_cpu_mem_usage=True)
    with fakes, recorder:
        _fill_adapters(model, dtype)
    return model


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _quantised(parameter: Any, values: torch.Tensor) -> nn.Parameter:
    """What `Params4bit` would make of `values` on a GPU; the class itself can't hold a fake tensor."""
    packed, state = functional.quantize_4bit(
        values,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
    )
    quantised: Any = _frozen(packed)
    quantised.quant_state = state
    quantised.bnb_quantized = True
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):  # PEFT asks for them
        setattr(quantised, name, getattr(parameter, name))
    weight: nn.Parameter = quantised
    return weight


def _fill_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Adapters in the weights' dtype, then in fp32, as PEFT makes them."""
    places = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name in places:
        setattr(module, name, nn.Parameter(torch.empty(getattr(module, name).shape, dtype=dtype)))
    for module, name in places:
        setattr(module, name, nn.Parameter(getattr(module, name).data.to(torch.float32)))


def _know_state_codes() -> None:
    """Fill bitsandbytes' table of codes, which its 8-bit optimizers share, while tensors are still real."""
    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
