"""Everything a run needs, built and ready; what the loop works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from eightgig.config import TrainingConfig
from eightgig.core.seeds import derive_seed
from eightgig.data.check import SampleSize
from eightgig.data.encode import Encoder
from eightgig.data.order import StepOrder
from eightgig.data.sample import Sample
from eightgig.models.load import LoadedModel
from eightgig.step.layer_levers import LayerLevers
from eightgig.step.step import TrainingStep
from eightgig.train.image_features import FedRun
from eightgig.train.memory_meter import MemoryMeter
from eightgig.train.planning import PlannedMemory
from eightgig.train.run_levers import PassSize


@dataclass(frozen=True)
class DataSets:
    """The samples of a run, checked, and what the check found.

    Attributes:
        train_sizes: those of the training samples, in their order.
        fingerprint: hash of the training samples' ids, texts and image files' names and sizes, to be the same on
            resume.
        num_quarantined: samples left out of either set.
        num_cut_prompt_samples: samples whose prompt is longer than `max_length` and gets cut.
        num_cut_answer_samples: samples whose answers alone are longer and get cut.
        files: the beginning of the SHA-256 of every data file by path, and what the training images come to: to name
            what has changed.
    """

    train: tuple[Sample, ...]
    train_sizes: tuple[SampleSize, ...]
    validation: tuple[Sample, ...]
    fingerprint: str
    num_quarantined: int
    num_cut_prompt_samples: int
    num_cut_answer_samples: int
    has_images: bool
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """One run, ready to start or to go on.

    Attributes:
        layer_levers: on the model's layers.
        samples_at_once: the most that go through the model together, fewer from where memory ran out; None = as many as
            the config says.
        encoder: makes the run's batches, with kept features in place of pixels where the model is fed with them.
        planned: the GPU memory that was planned; None without a GPU, off the main process, or if it can't be planned.
        fed: the model without its tower, and what feeds it; None where the tower computes in every step.
    """

    config: TrainingConfig
    accelerator: Accelerator
    loaded: LoadedModel
    encoder: Encoder
    data: DataSets
    order: StepOrder
    num_steps: int
    step: TrainingStep
    layer_levers: LayerLevers
    meter: MemoryMeter
    planned: PlannedMemory | None
    fed: FedRun | None = None
    samples_at_once: int | None = None

    @property
    def model(self) -> nn.Module:
        """The model with its adapters."""
        model: nn.Module = self.loaded.model
        return model

    @property
    def validation_batch_size(self) -> int:
        """Samples of a validation that go through the model together."""
        wanted = self.config.training.batch_size
        return wanted if self.samples_at_once is None else min(wanted, self.samples_at_once)

    def validation_pass_size(self) -> PassSize:
        """The largest forward pass of a validation, whose tokens are not counted."""
        return PassSize(self.validation_batch_size)

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """What learns, by name."""
        return self.step.trainable

    @property
    def generation_samples(self) -> Sequence[Sample]:
        """The fixed validation samples whose answers are generated, spread evenly over the validation set."""
        num_wanted = min(self.config.validation.num_generated, len(self.data.validation))
        return [self.data.validation[i * len(self.data.validation) // num_wanted] for i in range(num_wanted)]

    def seed_of_step(self, step: int) -> int:
        """What every generator of this process starts from in `step`: a repeated step draws what it drew before."""
        return derive_seed(self.config.seed, "step", step, self.accelerator.process_index) % 2**32  # numpy's limit

    def take_tower_back(self) -> None:
        """Put a tower that was off the card back, and pixels in its features' place, for what comes after training."""
        if self.fed is not None:
            self.fed.take_tower_back(self.loaded.device)
            self.encoder = self.fed.pixel_encoder
            self.fed = None

    def give_up_model(self) -> None:
        """Drop model, optimizer and all else that holds GPU memory; the run can't be trained on after this."""
        del self.step
        del self.layer_levers
        del self.loaded

    def total_over_processes(self, *counts: int) -> list[int]:
        """Each count added up over all processes."""
        if self.accelerator.num_processes == 1:
            return list(counts)
        summed = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device), "sum")
        return [int(count) for count in summed]
