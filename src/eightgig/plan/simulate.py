"""The memory of a run, found by running its own code on fake tensors: load, validate, two steps, validate, save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from eightgig.checkpoint.codec import to_json_and_tensors
from eightgig.checkpoint.training_state import training_state
from eightgig.core.errors import UnsupportedModel
from eightgig.core.garbage import collector_paused, present_objects_kept
from eightgig.data.batch import MicroBatch
from eightgig.data.collate import collate
from eightgig.evaluate.generate import answer_batch, first_exchange
from eightgig.evaluate.loss import validation_loss
from eightgig.models.packed_rows import pack_as_configured
from eightgig.models.precision import Precision
from eightgig.models.tower_features import check_features_can_be_kept, check_tower_is_fixed
from eightgig.models.trainable import weights_to_save
from eightgig.plan.cached_features import SimulatedFeatures
from eightgig.plan.categories import OTHER
from eightgig.plan.cuda_functions import fuse_dropout
from eightgig.plan.cuda_rules import CudaRules
from eightgig.plan.fake_model import CPU, CUDA, build_fake
from eightgig.plan.host_memory import HostBatch, HostCopies, HostTransfers, keep_paged_states_on_host
from eightgig.plan.host_weights import HostWeights
from eightgig.plan.layer_memo import LayerMemo
from eightgig.plan.op_costs import OpCost
from eightgig.plan.parts import label_weights, tell_parts
from eightgig.plan.recorder import Recorder
from eightgig.plan.simulated_steps import NUM_STEPS, SimulatedSteps, UpdateMemo
from eightgig.plan.trace import MemoryTrace
from eightgig.plan.workload import Workload
from eightgig.step.build import (
    build_compute,
    build_step,
    checkpoint_as_configured,
    fuse_lora_as_configured,
    group_rows_as_configured,
    offload_as_configured,
    tile_as_configured,
)
from eightgig.step.step import Compute, TrainingStep

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

_ASKS_FOR_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)

MAX_PASSES = 2  # the first makes the gradients, the second finds them there, as all later ones do

OUTSIDE_LAYERS = {
    "training": {"batch_size", "gradient_accumulation_steps", "optimizer", "loss_chunk_tokens"},
    # Whether a layer is checkpointed is told by its code, which recordings know.
    "hardware": {"checkpointed_layers", "micro_batches_per_pass"},
}
"""Settings that change nothing within a layer but the shapes of what it is given."""


@dataclass(frozen=True)
class Simulation:
    """What a simulated run allocated.

    Attributes:
        trace: with the phases load, validate, train, validate and save; behind load features, where they are kept.
        weights_4bit_bytes: with their scales.
        num_4bit_parameters: how many weights are stored in 4 bits.
        micro_batch_costs: one forward and backward pass, each kind of operation with how often it runs; of several
            micro-batches where they share passes.
        update_costs: clipping and the optimizer.
        host_bytes: of weights that are kept in host memory.
        feature_bytes: on the disk, of the features of a pass's images; 0 where none are kept.
    """

    trace: MemoryTrace
    weights_4bit_bytes: int
    num_4bit_parameters: int
    micro_batch_costs: Mapping[OpCost, float]
    update_costs: Mapping[OpCost, float]
    host_bytes: int = 0
    feature_bytes: int = 0


class Simulator:
    """A model on fake tensors, on which runs are simulated one after the other.

    The runs share what the model is built from: its name, the training method, adapters, precision and image size.
    """

    def __init__(
        self,
        config: TrainingConfig,
        spec: ModelSpec,
        processor: Any,
        precision: Precision,
        compute_capability: tuple[int, int],
        *,
        remembers_layers: bool = True,
    ) -> None:
        """Build the model, which needs neither weights nor a GPU.

        With `remembers_layers` equal layers, passes and updates are simulated once, with the same traces as without.
        """
        self._spec = spec
        self._precision = precision
        self._memos: dict[str, LayerMemo] | None = {} if remembers_layers else None
        self._updates = UpdateMemo() if remembers_layers else None
        self._loading = MemoryTrace()
        self._loading.mark("load")
        self._recorder = Recorder(self._loading, CudaRules(compute_capability))
        with collector_paused():
            self._model = build_fake(config, spec, processor, precision, self._recorder)
        label_weights(self._model, self._recorder)
        tell_parts(self._model, spec, self._recorder)
        self._features: SimulatedFeatures | None = None

    @property
    def num_decoder_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self._spec.family.decoder_layers(self._model))

    def run(self, config: TrainingConfig, work: Workload, *, validates: bool = True) -> Simulation:
        """Simulate `config` with the batch of `work` in every pass.

        `validates`: with all that stands around training: validation before and after it, and saving at the end.

        Raises:
            ConfigError: its image features are to be kept, weights to stay on the host, or samples to share rows, and
                can't.
            UnsupportedModel: the model's code takes decisions from values, which are not there; or its tower, whose
                features are to be kept, drops values at random.
        """
        check_features_can_be_kept(config, self._spec)
        if config.hardware.levers.cache_image_features:
            check_tower_is_fixed(self._model, self._spec)
        host = HostWeights(config, self._spec, self._model, self._recorder)
        trace = host.loading(self._loading)
        with self._recorder.leaving_out(host.tensors()):
            simulation = self._run_in(trace, config, work, host, validates=validates)
        return replace(simulation, host_bytes=host.host_bytes)

    def _run_in(
        self, trace: MemoryTrace, config: TrainingConfig, work: Workload, host: HostWeights, *, validates: bool
    ) -> Simulation:
        """Write the run into `trace`, and leave the model as it was found."""
        forwards = {module: vars(module).get("forward") for module in self._model.modules()}
        self._recorder.continue_in(trace)
        self._recorder.category = OTHER
        handles = []
        try:
            with present_objects_kept():
                handles = host.engage()
                return self._run(config, work, trace, validates=validates)
        except _ASKS_FOR_VALUES as error:
            raise UnsupportedModel(
                f"{self._spec.name} can't be planned: its code asks for the values of tensors ({error})",
                expected="a model whose memory follows from the shapes of its inputs",
                next_step="train it with `eightgig train`, which says what it took",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            self._recorder.continue_in(self._loading)
            if self._features is not None:
                self._features.model.take_back()
                self._features = None
            for module, forward in forwards.items():
                vars(module).pop("forward", None)
                if forward is not None:
                    vars(module)["forward"] = forward
            for parameter in self._model.parameters():
                parameter.grad = None

    def _run(self, config: TrainingConfig, work: Workload, trace: MemoryTrace, *, validates: bool) -> Simulation:
        model, spec = self._model, self._spec
        fuse_dropout(model)
        pack_as_configured(config, spec, model)
        fuse_lora_as_configured(config, spec, model)
        tile_as_configured(config, spec, model)
        checkpoint_as_configured(config, spec, model)
        if self._memos is not None:
            memo = self._memos.setdefault(_layer_settings(config), LayerMemo(self._recorder))
            memo.wrap(model, in_groups=config.hardware.levers.micro_batches_per_pass > 1)
        offload_as_configured(config, spec, model, HostTransfers(self._recorder))
        group_rows_as_configured(config, spec, model)
        compute = replace(build_compute(config, CUDA, self._precision), device=CPU)
        step = build_step(config, spec, model, compute, num_steps=NUM_STEPS, optimizer_device=CUDA)
        keep_paged_states_on_host(step.optimizer, self._recorder)
        if config.hardware.levers.cache_image_features and work.batch.num_images:
            with self._recorder:
                trace.mark("features")
                one = (work.validation or work).batch  # they are computed for one micro-batch at a time
                images = one if one.num_images else work.batch
                self._features = SimulatedFeatures(model, spec, images, compute, self._recorder)
        batch = self._on_host(work.batch)
        num_passes = min(config.passes_per_step, MAX_PASSES)
        steps = SimulatedSteps(
            step,
            self._recorder,
            trace,
            repeats=self._memos is not None and not config.hardware.streamed_layers,
            updates=None if validates else self._updates,
            settings=_update_settings(config),
        )
        with self._recorder:
            if validates:
                trace.mark("validate")
                self._validate(work, compute)
            passes, update = steps.run([batch] * num_passes, batch.num_target_tokens)
            if validates:
                trace.mark("validate")
                self._validate(work, compute)
                trace.mark("save")
                self._save(step)
        self._recorder.continue_in(self._loading)  # what goes from here on, whenever the collector comes, is no event
        costs = {cost: count / num_passes for cost, count in passes.items()}
        feature_bytes = 0 if self._features is None else self._features.num_bytes(work.batch)
        return replace(_result(trace, model, costs, update), feature_bytes=feature_bytes)

    def _save(self, step: TrainingStep) -> None:
        """A checkpoint's tensors, collected as `checkpoint.store` does before it writes them."""
        with HostCopies(self._recorder):
            weights_to_save(self._model)
            to_json_and_tensors(training_state(step))

    def _on_host(self, batch: MicroBatch) -> HostBatch:
        """`batch` in the host's memory, with features in place of pixels where they are kept."""
        return HostBatch.of(batch if self._features is None else self._features.fed(batch))

    def _validate(self, work: Workload, compute: Compute) -> None:
        """A run's validation: the loss over a batch, and the first token of an answer to its prompts."""
        work = work.validation or work
        validation_loss(self._model, self._spec.family, [self._on_host(work.batch)], compute)
        if work.num_generated:
            encoder = work.encoder
            with self._recorder.paused():  # prompts are encoded on the host
                prompts = [encoder.encode_prompt(first_exchange(s)[0]) for s in work.samples[: work.num_generated]]
                batch = collate(prompts, encoder.pad_token_id, encoder.image_layout)
            self._recorder.flag = True  # every answer ends with its first token
            answer_batch(self._model, encoder, self._on_host(batch), compute, max_new_tokens=1)
            self._recorder.flag = False


def simulate(
    config: TrainingConfig,
    spec: ModelSpec,
    work: Workload,
    precision: Precision,
    compute_capability: tuple[int, int],
    *,
    remembers_layers: bool = True,
) -> Simulation:
    """Simulate one run of `config` on a card of `compute_capability`; see `Simulator`."""
    simulator = Simulator(
        config, spec, work.processor, precision, compute_capability, remembers_layers=remembers_layers
    )
    return simulator.run(config, work)


def _layer_settings(config: TrainingConfig) -> str:
    """What of `config` may change how a layer runs: runs that have it in common share what is known of layers."""
    return config.model_dump_json(exclude={"preset": True, **OUTSIDE_LAYERS})


def _update_settings(config: TrainingConfig) -> str:
    """What of `config` may change an update, beside the gradients."""
    return config.training.model_dump_json(exclude=OUTSIDE_LAYERS["training"] - {"optimizer"})


def _result(
    trace: MemoryTrace,
    model: nn.Module,
    micro_batch_costs: Mapping[OpCost, float],
    update_costs: Mapping[OpCost, float],
) -> Simulation:
    quantised: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "quant_state")]
    return Simulation(
        trace=trace,
        weights_4bit_bytes=sum(_quantised_bytes(parameter) for parameter in quantised),
        num_4bit_parameters=sum(parameter.quant_state.shape.numel() for parameter in quantised),
        micro_batch_costs=micro_batch_costs,
        update_costs=update_costs,
    )


def _quantised_bytes(parameter: Any) -> int:
    state = parameter.quant_state
    parts = [parameter, state.absmax, *([state.state2.absmax] if state.state2 is not None else [])]
    return sum(part.numel() * part.element_size() for part in parts)
