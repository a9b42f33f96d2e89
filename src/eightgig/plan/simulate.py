"""The memory of a run, found by running its own code on fake tensors: load, validate, two optimizer steps, validate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eightgig.evaluate.generate import generate_answers
from eightgig.evaluate.loss import validation_loss
from eightgig.models.precision import Precision
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.fake_model import CPU, CUDA, build_fake
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import MemoryTrace
from eightgig.plan.workload import Workload
from eightgig.step.build import build_compute, build_step, checkpoint_as_configured
from eightgig.step.step import Compute

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

NUM_STEPS = 2  # optimizer states appear in the first; the second is what all later ones are like

MAX_MICRO_BATCHES = 2  # the first makes the gradients, the second finds them there, as all later ones do


@dataclass(frozen=True)
class Simulation:
    """What a simulated run allocated.

    Attributes:
        trace: with the phases load, validate, train and validate.
        weights_4bit_bytes, weights_16bit_bytes: frozen parameters; of full fine-tuning, trained ones are among them.
        adapters_bytes: trained parameters of adapters.
        gradients_bytes: of every trained parameter.
        optimizer_bytes: states on the GPU.
    """

    trace: MemoryTrace
    weights_4bit_bytes: int
    weights_16bit_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int


def simulate(
    config: TrainingConfig,
    spec: ModelSpec,
    work: Workload,
    precision: Precision,
    compute_capability: tuple[int, int],
) -> Simulation:
    """Run `config` on fake tensors with the batch of `work` as every micro-batch, on a card of `compute_capability`.

    Nothing is computed; needs neither weights nor a GPU.
    """
    trace = MemoryTrace()
    recorder = Recorder(trace, CudaRules(compute_capability))
    trace.mark("load")
    model = build_fake(config, spec, work.processor, precision, recorder)
    lora = config.training.lora
    checkpoint_as_configured(config, spec, model)
    compute = replace(build_compute(config, CUDA, precision), device=CPU)
    step = build_step(config, spec, model, compute, num_steps=NUM_STEPS, optimizer_device=CUDA)
    num_micro_batches = min(config.training.gradient_accumulation_steps, MAX_MICRO_BATCHES)
    with recorder:
        trace.mark("validate")
        _validate(model, spec, work, compute, recorder)
        for _ in range(NUM_STEPS):
            trace.mark("train")
            step([work.batch] * num_micro_batches, work.batch.num_target_tokens)
            step.apply(step.finish_gradients())
        trace.mark("validate")
        _validate(model, spec, work, compute, recorder)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = list(step.trainable.values())
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    return Simulation(
        trace=trace,
        weights_4bit_bytes=sum(_quantised_bytes(parameter) for parameter in frozen),
        weights_16bit_bytes=_bytes(p for p in frozen if not hasattr(p, "quant_state"))
        + (0 if lora else _bytes(trained)),
        adapters_bytes=_bytes(trained) if lora else 0,
        gradients_bytes=_bytes(trained),
        optimizer_bytes=_bytes(value for value in states if isinstance(value, torch.Tensor)),
    )


def _validate(model: Any, spec: ModelSpec, work: Workload, compute: Compute, recorder: Recorder) -> None:
    """A run's validation: the loss over a batch, and the first token of an answer to its prompts."""
    validation_loss(model, spec.family, [work.batch], compute)
    if work.num_generated:
        recorder.flag = True  # every answer ends with its first token
        generate_answers(
            model,
            work.encoder,
            work.samples[: work.num_generated],
            compute,
            batch_size=len(work.samples),
            max_new_tokens=1,
        )
        recorder.flag = False


def _bytes(tensors: Any) -> int:
    unique = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(unique.values())


def _quantised_bytes(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    nested = state.state2
    return _bytes([parameter, state.absmax, *([nested.absmax] if nested is not None else [])])
