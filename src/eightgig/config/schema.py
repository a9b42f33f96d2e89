"""`TrainingConfig`, the only thing a user writes, and its sections. Frozen, closed to unknown keys, checked when built.

Built in Python, a wrong value raises pydantic's ValidationError, as Python users expect; configurations that come from
files, presets and flags raise `ConfigError` (see `loading`). What needs the card or the model is checked where they are
known, not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from eightgig.config import method as training_method
from eightgig.config.clash import raise_clashes
from eightgig.config.enums import Batching, MixedPrecision, OptimizerName, TrainingMethod, WhenDiskIsFull
from eightgig.config.fields import (
    AutoCount,
    AutoFlag,
    AutoNumber,
    AutoStreamedLayers,
    Count,
    CountOrZero,
    FilePath,
    Flag,
    Fraction,
    ImageSide,
    LearningRate,
    Pattern,
    PositiveNumber,
    Rank,
    Section,
    Seed,
    Text,
)
from eightgig.config.levers import AUTO, Levers
from eightgig.config.rules import check_preset_name, contradictions

SCHEMA_VERSION = 1


class ModelConfig(Section):
    """Which model is fine-tuned."""

    name: Text = Field("llava-1.5-7b", description="registry name, local folder or hub id")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub; null = the default branch")
    random_weights_seed: Seed | None = Field(
        None, description="build the model with random weights from this seed instead of loading any; for benchmarks"
    )


class LoRAConfig(Section):
    """The adapters."""

    rank: Rank = Field(16, description="inner dimension of each adapter")
    alpha: Count = Field(32, description="updates are scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="share of adapter inputs dropped in training")
    target_modules: Pattern | None = Field(
        None,
        description="regular expression that full module paths must match; null = the language model's linear layers",
    )


class QuantizationConfig(Section):
    """How the frozen weights are stored."""

    load_in_4bit: Flag = Field(True, description="store the language model's linear layers in 4 bits")
    vision_tower: Flag = Field(
        False, description="store the vision tower's linear layers in 4 bits too; its features change a little"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="the sixteen 4-bit values")
    bnb_4bit_use_double_quant: Flag = Field(True, description="quantise the block scales too")
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="type that 4-bit weights are unpacked to; auto = that of hardware.mixed_precision"
    )


class TrainingHyperparameters(Section):
    """How the weights learn. `method`, `lora` and `quantization.load_in_4bit` follow from each other."""

    method: TrainingMethod = Field(
        TrainingMethod.QLORA,
        description="qlora, lora or full; told from quantization.load_in_4bit and lora where it is not given",
    )
    batch_size: Count = Field(1, description="samples in one forward pass")
    gradient_accumulation_steps: Count = Field(16, description="forward passes in one optimizer step")
    batching: Batching = Field(
        Batching.IN_ORDER,
        description="which of a step's samples go through together: in_order = as they come; by_length = those of "
        "nearly equal length, for less padding; packed = as many as fill a row, for none",
    )
    num_epochs: Count = Field(3, description="passes over the training data")
    max_steps: Count | None = Field(None, description="stop after this many optimizer steps; null = after num_epochs")
    learning_rate: LearningRate = Field(2e-4, description="peak rate, reached after the warm-up")
    weight_decay: Fraction = Field(0.0, description="decoupled decay of AdamW")
    warmup_ratio: Fraction = Field(0.03, description="share of all steps in which the rate rises from 0")
    lr_schedule: Literal["cosine", "constant"] = Field("cosine", description="what follows the warm-up")
    max_grad_norm: PositiveNumber = Field(1.0, description="gradients are clipped to this norm")
    max_skipped_steps: Count = Field(
        5, description="stop after so many steps in a row without a finite loss and gradient; each of them is skipped"
    )
    optimizer: OptimizerName = Field(
        OptimizerName.AUTO, description="auto = 8-bit AdamW on CUDA, PyTorch's AdamW on the CPU"
    )
    loss_chunk_tokens: Count = Field(1024, description="target positions whose logits exist at one time")
    lora: LoRAConfig | None = Field(default_factory=LoRAConfig, description="the adapters; null = none")
    quantization: QuantizationConfig = Field(
        default_factory=QuantizationConfig, description="how the frozen weights are stored"
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        raise_clashes(cls.__name__, training_method.contradictions_without_method(values))
        return training_method.complete(values)

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        clashes = training_method.contradictions(
            self.method, has_lora=self.lora is not None, load_in_4bit=self.quantization.load_in_4bit
        )
        raise_clashes(type(self).__name__, clashes)
        return self


class DataConfig(Section):
    """What is learnt from."""

    data_path: FilePath | None = Field(None, description="training data: a .json or .jsonl file, or a folder of images")
    val_path: FilePath | None = Field(
        None, description="validation data; null = hold out val_fraction of the training data"
    )
    image_root: FilePath | None = Field(
        None, description="folder that relative image paths start from; null = the data file's folder"
    )
    max_length: Count = Field(512, description="longest text, in tokens; image tokens come on top and are never cut")
    image_size: ImageSide | None = Field(
        None, description="image side in px, a cap where sizes are dynamic; null = the model's own"
    )
    val_fraction: Fraction = Field(0.05, description="share held out for validation where val_path is null")
    max_bad_fraction: Fraction = Field(0.01, description="share of unusable samples above which nothing is trained")
    num_workers: CountOrZero = Field(2, description="processes that decode images; 0 = the training process itself")
    worker_start_method: Literal["auto", "fork", "spawn", "forkserver"] = Field(
        "auto", description="how those processes start; auto = the system's usual way"
    )
    worker_timeout_s: Count | None = Field(
        300, description="seconds after which such a process that gives nothing is ended and started anew; null = never"
    )


class HardwareConfig(Section):
    """What the run computes on."""

    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto = the GPU where there is one")
    mixed_precision: MixedPrecision = Field(
        MixedPrecision.BF16, description="type of the computation; what the device lacks is replaced, and said"
    )
    gradient_checkpointing: Flag = Field(True, description="recompute each layer in the backward pass to save memory")
    checkpointed_layers: AutoCount = Field(
        AUTO,
        description="decoder layers, counted from the first, that are recomputed; null = all of them, "
        "auto = as few as the card lets",
    )
    offload_layer_inputs: AutoFlag = Field(
        AUTO,
        description="keep what recomputed layers start from in the host's memory until the backward pass; "
        "auto = where the card needs it",
    )
    mlp_tile_tokens: AutoCount = Field(
        AUTO,
        description="tokens that the MLP of a layer takes at one time; null = all of a batch, "
        "auto = fewer where the card needs it",
    )
    tiled_projections: Flag = Field(
        False, description="have the norms and linear layers around attention take mlp_tile_tokens at one time, too"
    )
    embedding_on_host: AutoFlag = Field(
        AUTO,
        description="keep the frozen table of input embeddings in RAM, not on the GPU; auto = where the card needs it",
    )
    streamed_layers: AutoStreamedLayers = Field(
        AUTO,
        description="decoder layers whose 4-bit weights stay in RAM and come to the GPU when they are due; 0 = none, "
        "auto = as few as the card lets",
    )
    fused_lora: Flag = Field(
        False,
        description="compute adapters that share an input together, in the type of hardware.mixed_precision instead of "
        "fp32; not in fp16, nor with training.lora.dropout",
    )
    micro_batches_per_pass: AutoNumber = Field(
        AUTO,
        description="micro-batches that go through a layer one after another while its weights are on the GPU; "
        "auto = more than one where streamed weights are waited for",
    )
    cap_gib: PositiveNumber | None = Field(
        None, description="limit of what PyTorch may reserve on the GPU, in GiB; null = the whole card"
    )
    rehearsal: Flag = Field(
        True, description="before the first step, try the largest micro-batch, a validation and a checkpoint"
    )
    cache_image_features: AutoFlag = Field(
        AUTO,
        description="compute each image's features once, keep them on the disk, and train without the vision tower; "
        "auto = where the card needs it",
    )
    feature_cache_gib: PositiveNumber | None = Field(
        None, description="limit of what kept image features may take on the disk, in GiB; null = what is free there"
    )

    @property
    def levers(self) -> Levers:
        """The levers as a run has them; "auto", where no plan has chosen, is the plain value."""
        return Levers.of(self)


class ValidationConfig(Section):
    """How often, and on what, the model is tested during the run."""

    every_steps: Count | None = Field(50, description="validate every so many optimizer steps; null = only at the end")
    max_samples: Count | None = Field(200, description="samples for the loss; null = all")
    num_generated: CountOrZero = Field(8, description="samples that are answered and compared with the expected answer")
    max_new_tokens: Count = Field(64, description="longest generated answer, in tokens")


class CheckpointConfig(Section):
    """What is kept on disk during the run."""

    every_steps: Count = Field(50, description="write a checkpoint every so many optimizer steps")
    keep_last: Count = Field(2, description="checkpoints kept beside the best one")
    when_disk_is_full: WhenDiskIsFull = Field(
        WhenDiskIsFull.STOP, description="stop = end the run at its last checkpoint; go_on = train on without new ones"
    )


class TrainingConfig(Section):
    """All settings of one run."""

    schema_version: Count = Field(SCHEMA_VERSION, description="version of this layout of settings")
    preset: Text | None = Field(None, description="preset that the values come from, where not given otherwise")
    model: ModelConfig = Field(default_factory=ModelConfig, description="which model is fine-tuned")
    training: TrainingHyperparameters = Field(
        default_factory=TrainingHyperparameters, description="how the weights learn"
    )
    data: DataConfig = Field(default_factory=DataConfig, description="what is learnt from")
    hardware: HardwareConfig = Field(default_factory=HardwareConfig, description="what the run computes on")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="when and on what to validate")
    checkpoints: CheckpointConfig = Field(default_factory=CheckpointConfig, description="what is kept on disk")
    output_dir: FilePath = Field(Path("runs"), description="folder in which each run gets a folder of its own")
    seed: Seed = Field(42, description="of everything random: shuffling, hold-out, adapters, dropout")

    @property
    def samples_per_pass(self) -> int:
        """Samples that go through the model together, forward and backward: of one micro-batch, or of several."""
        return self.training.batch_size * self.hardware.levers.micro_batches_per_pass

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of the model in an optimizer step."""
        return self.training.gradient_accumulation_steps // self.hardware.levers.micro_batches_per_pass

    @field_validator("schema_version")
    @classmethod
    def _check_schema_version(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise PydanticCustomError(
                "schema_version",
                "{known} at most: it was written by a newer EightGig; upgrade with `pip install -U eightgig`",
                {"known": SCHEMA_VERSION},
            )
        return version

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str | None) -> str | None:
        if preset is not None:
            check_preset_name(preset)
        return preset

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        raise_clashes(type(self).__name__, contradictions(self))
        return self
