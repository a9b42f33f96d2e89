"""The demo's settings. Each was measured by the pilot (docs/decisions/0003-embedded-model.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSettings:
    """How the demo fine-tunes the embedded model on charts: enough to be sure of it, and no more."""

    num_train_images: int = 1920
    """Half as many as the run draws (240 steps of 16): each picture is seen twice, and writing them takes seconds."""

    num_test_images: int = 200
    """Ten of each value, so that the answers are exactly uniform."""

    batch_size: int = 16
    """Pictures a step, with four to six questions each; larger ones make a step slower and learn no faster in time."""

    gradient_accumulation_steps: int = 1
    """A batch of 16 fits everywhere."""

    max_steps: int = 240
    """Half of them do as well in the pilot; the rest is margin, for other seeds and for a cosine that ends at 0."""

    learning_rate: float = 2e-3
    """Ten times what a 7B model takes: the model is a thousand times smaller and has 240 steps."""

    warmup_ratio: float = 0.08
    """19 steps, in which the zero half of each adapter grows."""

    weight_decay: float = 0.0
    """Nothing to regularise: the pictures are new nearly every time."""

    max_grad_norm: float = 1.0
    """The usual limit; it acts in the first steps only."""

    lora_rank: int = 16
    """All 28 linear layers of the language model: 327,680 fp32 weights, 4 % of the model."""

    lora_alpha: int = 32
    """Twice the rank, as is usual."""

    lora_dropout: float = 0.0
    """Dropout only slows a run of two epochs."""

    max_length: int = 128
    """Text tokens: the longest conversation, six bars, has 93 of them."""

    image_size: int = 128
    """The embedded model's own size in pixels: 64 image tokens."""

    validate_every_steps: int = 40
    """Six glances, for a curve that shows when it learns; each costs about two seconds."""

    num_workers: int = 1
    """One process reads pictures ahead; more would take the cores from the training."""

    max_new_tokens: int = 4
    """A value is one token, and one ends the answer; two more let an answer that is none be seen."""
