"""What a family gives to the checks that every family must pass: a tiny architecture, and what it must come to."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from eightgig.registry.facts import ModelFacts
from eightgig.registry.family import ModelFamily

FIRST_SIZE = (53, 37)
SECOND_SIZE = (29, 61)
WIDE_SIZE = (400, 9)
"""Width and height, in pixels, of the images in the checks' samples."""


@dataclass(frozen=True)
class TinyFamily:
    """One model type, small enough to train on a CPU in seconds.

    All inner sizes must be multiples of 64, and the vocabulary must hold 256 bytes beside the special tokens.

    Attributes:
        name: the test's id.
        family: what is checked.
        facts: those of a tiny model: `architecture`, `num_language_linears`, `image_px`, `image_settings`.
        conversation: how CHECKED_MESSAGES of `family_checks` (FIRST_SIZE and SECOND_SIZE its images) must reach the
            model, written by hand: stretches of text, image tokens and all, and whether the loss counts them.
        quantised: pattern of the modules that must be 4-bit; None: those that carry adapters, no others.
        random_side_px: sides of the random images are drawn from 4 to this.
        caps_px: settings of `data.image_size` that the image-token rule is tried with, beside none.
        processor_call: whether the processor itself makes all inputs of a rendered conversation, to compare ours with.
    """

    name: str
    family: ModelFamily
    facts: ModelFacts
    conversation: tuple[tuple[str, bool], ...]
    quantised: str | None = None
    random_side_px: int = 160
    caps_px: tuple[int, ...] = ()
    processor_call: bool = True


def tiny_facts(published: ModelFacts, architecture: Mapping[str, Any], **changes: Any) -> ModelFacts:
    """The facts of a tiny model that no hub has, in the manner of `published`."""
    return dataclasses.replace(
        published, name="tiny", aliases=(), hub_id=None, architecture=architecture, num_parameters=0, **changes
    )


def build_tiny_family(tiny: TinyFamily, folder: Path, *, seed: int = 0) -> Path:
    """`folder`, holding the model with random weights and its processor, for `from_pretrained`.

    Weights that start at zero (Gemma 3's projection, gates of cross-attention) would hide the image from the language
    model, and so any mistake about it: they get random values too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(tiny.family.build_config(tiny.facts), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith("bias") and not parameter.any():
                    parameter.normal_(0.0, 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tiny.family.build_processor(tiny.facts).save_pretrained(folder)
    return folder


def all_tiny_families() -> tuple[TinyFamily, ...]:
    """Every `TINY` of the modules in tests/tiny_families."""
    modules = sorted((Path(__file__).parent / "tiny_families").glob("*.py"))
    return tuple(tiny for path in modules for tiny in importlib.import_module(f"tiny_families.{path.stem}").TINY)
