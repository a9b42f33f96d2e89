"""Holding out a share of the samples for validation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from eightgig.core.seeds import derive_seed
from eightgig.data.sample import Sample


def split_validation(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """`samples` as (training, validation), both in their old order; the same for the same samples and seed.

    Samples that share their first image go to the same side, so that no validation image was trained on. The
    validation part is the smallest number of such groups with at least `fraction` of the samples, at least one
    group and never all of them; when all samples share one image they are split one by one.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[_group_key(sample, index)].append(index)
    members = list(groups.values()) if len(groups) > 1 else [[index] for index in range(len(samples))]
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation split"))
    target = fraction * len(samples)
    held_out: set[int] = set()
    if fraction > 0:
        for position in torch.randperm(len(members), generator=generator).tolist()[:-1]:
            held_out.update(members[position])
            if len(held_out) >= target:
                break
    training = tuple(sample for index, sample in enumerate(samples) if index not in held_out)
    return training, tuple(samples[index] for index in sorted(held_out))


def _group_key(sample: Sample, index: int) -> Hashable:
    """What samples of one group have in common: their first image, or nothing."""
    images = sample.images
    if not images:
        return index
    return images[0].path if images[0].path is not None else images[0].data
