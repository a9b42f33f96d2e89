"""Samples longer than what a model was trained for: they train, and the user should know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eightgig.data.check import SampleSize

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec


def positions_note(
    config: TrainingConfig, spec: ModelSpec, model_config: Any, sizes: Sequence[SampleSize]
) -> str | None:
    """What to say where the longest of the samples of `sizes` has more tokens than the model's config has positions.

    None where none has, or where the config names no limit. Image tokens of a derived family are left out: they can
    only be counted by processing each image.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None

    def num_tokens(size: SampleSize) -> int:
        if spec.family.derivation:
            return size.num_text_tokens
        images = (
            spec.family.num_image_tokens(spec.facts, config.data.image_size, width_px=width, height_px=height)
            for width, height in size.image_sizes_px
        )
        return size.num_text_tokens + sum(images)

    counts = [num_tokens(size) for size in sizes]
    num_longer = sum(count > positions for count in counts)
    if not num_longer:
        return None
    return (
        f"{num_longer:,} training samples are longer than the {positions:,} tokens that {spec.name} was trained for, "
        f"the longest {max(counts):,}: what it learns of their ends may be poor; lower data.max_length to cut them"
    )
