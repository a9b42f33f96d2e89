"""From a config to a run that is ready: device, data, model, optimizer, in the order in which mistakes are cheapest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from eightgig.config import TrainingConfig
from eightgig.config.levers import automatic_paths
from eightgig.core.errors import ConfigError, EnvironmentProblem, Problem
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sets import read_data
from eightgig.memory.cap import limit_allocator
from eightgig.memory.device_use import used_by_others
from eightgig.memory.segments import prefer_expandable_segments
from eightgig.models.adapters import adapted_layers, attach_adapters
from eightgig.models.least_memory import CONTEXT_BYTES
from eightgig.models.load import LoadedModel, load_model, load_processor
from eightgig.models.packed_rows import check_can_pack, pack_as_configured
from eightgig.models.precision import Precision, choose_precision
from eightgig.models.tower_features import check_features_can_be_kept
from eightgig.models.tower_in_4bit import tower_weights_kept
from eightgig.plan.levers import TOGETHER
from eightgig.registry import ModelSpec, resolve
from eightgig.step.build import build_compute, build_step, fuse_lora_as_configured, why_not_fused
from eightgig.step.layer_levers import LayerLevers
from eightgig.train.datasets import check_data
from eightgig.train.events import TrainingListener
from eightgig.train.image_features import FeatureCache, FeaturePlace, FedRun
from eightgig.train.largest_batch import LargestTrainingBatches, num_image_tokens, training_order
from eightgig.train.memory_meter import MemoryMeter
from eightgig.train.planning import PlanDoors, Question, plan_run
from eightgig.train.positions import positions_note
from eightgig.train.run import DataSets, Run
from eightgig.train.run_folder import RunFolder
from eightgig.train.tower_difference import measure_tower

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where a run computes and in which precision."""

    accelerator: Accelerator
    precision: Precision

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    def sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added up over all processes."""
        summed: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return summed

    def as_main_process_has(self, value: Value) -> Value:
        """The main process's `value`, in every process; each has to ask."""
        told = [value]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(told)
        return told[0]


def choose_place(config: TrainingConfig) -> Place:
    """The device and precision of `config` on this machine, with the memory cap set.

    Raises:
        EnvironmentProblem: CUDA is asked for and there is none.
        ConfigError: a cap without a GPU, or micro-batches that the processes can't share evenly.
    """
    if config.hardware.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "hardware.device is cuda, but PyTorch sees no CUDA device",
            expected="an NVIDIA GPU with its driver, and a CUDA build of PyTorch",
            next_step="check `nvidia-smi` and `python -c 'import torch; print(torch.version.cuda)'`, "
            "or set hardware.device to cpu",
        )
    prefer_expandable_segments()
    accelerator = Accelerator(cpu=config.hardware.device == "cpu" or not torch.cuda.is_available())
    accumulation, together = config.training.gradient_accumulation_steps, config.hardware.levers.micro_batches_per_pass
    if accumulation % (accelerator.num_processes * together):
        allowed = f"a multiple of the {accelerator.num_processes} processes, which share the micro-batches of a step"
        if together > 1:
            allowed += f", times hardware.micro_batches_per_pass = {together}"
        raise ConfigError(
            [Problem("training.gradient_accumulation_steps", str(accumulation), allowed)],
            source="accelerate launch",
            next_step="change training.gradient_accumulation_steps or the number of processes",
        )
    limit_allocator(accelerator.device, config.hardware.cap_gib)
    return Place(accelerator, choose_precision(config.hardware.mixed_precision, accelerator.device))


def build_run(
    config: TrainingConfig, place: Place, folder: RunFolder, listener: TrainingListener, doors: PlanDoors
) -> Run:
    """Everything that `config` describes, ready to train, with levers where it leaves them to the plan.

    The data is checked, and the memory planned on the card that `doors` tell, before any weight is loaded.
    """
    if place.precision.note is not None:
        listener.on_message(place.precision.note)
    read = read_data(config.data, Quarantine(folder.quarantine))
    spec = resolve(config.model.name, config.model.revision)
    check_features_can_be_kept(config, spec)
    check_can_pack(config, spec)
    for text in _notes(config, spec):
        listener.on_message(text)
    encoder = _build_encoder(config, spec)
    data = check_data(read, config, encoder, folder, listener)
    planned = None
    config = _for_processes(config, place.accelerator.num_processes)
    if place.accelerator.is_main_process:
        question = None
        card = doors.find_card(place.device)
        workload_of = LargestTrainingBatches(spec, encoder, data)
        if card is not None:
            tokens = functools.partial(num_image_tokens, config, spec, data)
            others_bytes = used_by_others(place.device, CONTEXT_BYTES)
            question = Question(config, spec, card, others_bytes, read, workload_of, tokens)
        config, planned = plan_run(config, question, doors.find_kept, folder, listener)
    config = place.as_main_process_has(config)
    listener.on_message(f"loading {spec.name}")
    tower_on_host = config.hardware.levers.cache_image_features  # it comes to the card if features are missing
    with tower_weights_kept(config, spec) as originals:
        loaded = load_model(config, spec, place.device, place.precision, tower_on_host=tower_on_host)
    note = positions_note(config, spec, loaded.model.config, data.train_sizes)
    if note is not None:
        listener.on_message(note)
    attach_adapters(loaded, config)
    layers = adapted_layers(loaded.model)
    if layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in layers.items())
        listener.on_message(f"adapters on {sum(layers.values())} layers: {kinds}")
    compute = build_compute(config, place.device, place.precision)
    meter = MemoryMeter(place.device)
    feature_place = FeaturePlace(compute, meter, place.accelerator)
    measure_tower(loaded, originals, encoder, data, feature_place, listener)
    fed = _fed(config, loaded, encoder, data, feature_place, listener)
    pack_as_configured(config, spec, loaded.model)
    idle = why_not_fused(config, place.precision)
    if idle is not None:
        listener.on_message(f"hardware.fused_lora changes nothing: {idle}")
    fuse_lora_as_configured(config, spec, loaded.model)
    layer_levers = LayerLevers(spec, loaded.model)
    layer_levers.put_on(config)
    training = config.training
    order = training_order(config, spec, data)
    num_steps = training.max_steps or order.steps_per_epoch * training.num_epochs
    step = build_step(
        config,
        spec,
        loaded.model,
        compute,
        num_steps=num_steps,
        sum_over_processes=place.sum_over_processes if place.accelerator.num_processes > 1 else None,
    )
    return Run(
        config=config,
        accelerator=place.accelerator,
        loaded=loaded,
        encoder=encoder if fed is None else fed.encoder,
        data=data,
        order=order,
        num_steps=num_steps,
        step=step,
        layer_levers=layer_levers,
        meter=meter,
        planned=planned,
        fed=fed,
    )


def _fed(
    config: TrainingConfig,
    loaded: LoadedModel,
    encoder: Encoder,
    data: DataSets,
    feature_place: FeaturePlace,
    listener: TrainingListener,
) -> FedRun | None:
    """The model fed with kept features, those that were missing computed; None where `config` wants none."""
    if not config.hardware.levers.cache_image_features:
        return None
    cache = FeatureCache(config, loaded, encoder, feature_place, listener)
    cache.fill((*data.train, *data.validation))
    feature_place.wait_for_everyone()
    return cache.feed()


def _for_processes(config: TrainingConfig, num_processes: int) -> TrainingConfig:
    """`config` without a choice of the plan that several processes might not share evenly."""
    if num_processes == 1 or TOGETHER not in automatic_paths(config):
        return config
    hardware = config.hardware.model_copy(update={"micro_batches_per_pass": 1})
    return config.model_copy(update={"hardware": hardware})


def _notes(config: TrainingConfig, spec: ModelSpec) -> Iterator[str]:
    """What the user should know about the model before it is loaded."""
    yield from spec.family.derivation
    image_px = config.data.image_size
    note = spec.family.image_px_note(spec.facts, image_px) if image_px is not None else None
    if note is not None:
        yield note


def _build_encoder(config: TrainingConfig, spec: ModelSpec) -> Encoder:
    image_px = config.data.image_size
    if image_px is not None:
        spec.family.check_image_px(spec.facts, image_px)
    processor = load_processor(config, spec)
    spec.family.apply_image_px(None, processor, image_px)
    return Encoder(processor, spec.family, max_length=config.data.max_length)
