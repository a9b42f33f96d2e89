"""Batches of freshly rendered scenes, the same for a seed whatever the number of worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.demo_model.conversation import ROW_TOKENS, RowEncoder
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from eightgig.demo.palette import IMAGE_SIZE_PX
from eightgig.demo.scenes import render_scene


@dataclass(frozen=True)
class Batch:
    """`pixels` (batch, 128, 128, 3) uint8, `ids` (batch, `ROW_TOKENS`) int64, `is_target` of the same shape, bool."""

    pixels: torch.Tensor
    ids: torch.Tensor
    is_target: torch.Tensor

    def pin_memory(self) -> Batch:
        return Batch(self.pixels.pin_memory(), self.ids.pin_memory(), self.is_target.pin_memory())


def render_batch(encoder: RowEncoder, seeds: range, *, max_num_questions: int = 6) -> tuple[Batch, list[str]]:
    """The batch of `seeds` and the kind of each row's first question."""
    pixels = np.empty((len(seeds), IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), dtype=np.uint8)
    ids = np.full((len(seeds), ROW_TOKENS), encoder.tokenizer.pad_token_id, dtype=np.int64)
    is_target = np.zeros((len(seeds), ROW_TOKENS), dtype=np.bool_)
    kinds = []
    for row, seed in enumerate(seeds):
        scene = render_scene(seed, max_num_questions=max_num_questions)
        row_ids, row_is_target = encoder.encode(scene.questions)
        pixels[row] = np.asarray(scene.image)
        ids[row, : len(row_ids)] = row_ids
        is_target[row, : len(row_ids)] = row_is_target
        kinds.append(scene.questions[0].kind)
    return Batch(torch.from_numpy(pixels), torch.from_numpy(ids), torch.from_numpy(is_target)), kinds


class SceneBatches(IterableDataset[Batch]):
    """An endless row of batches: batch i holds the scenes of seeds `seed + i * batch_size` onwards."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int) -> None:
        self.encoder = RowEncoder(tokenizer)
        self.seed = seed
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            start = self.seed + index * self.batch_size
            yield render_batch(self.encoder, range(start, start + self.batch_size))[0]
            index += stride


def scene_loader(batches: SceneBatches, num_workers: int, *, pin: bool) -> DataLoader[Batch]:
    """A loader that hands the workers' batches on in their order."""
    prefetch = 6 if num_workers else None
    return DataLoader(batches, batch_size=None, num_workers=num_workers, pin_memory=pin, prefetch_factor=prefetch)
