"""Inputs and logits of a trained model in a file, for another process to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eightgig.core.files import explained_write_errors
from eightgig.data.batch import IGNORE_INDEX, MicroBatch
from eightgig.models.load import LoadedModel
from eightgig.registry.family import base_model

MAX_POSITIONS = 64  # a batch; a position's logits take 128 KB at a vocabulary of 32 k


@dataclass(frozen=True)
class ReferenceBatch:
    """One batch and what the trained model said to it.

    Attributes:
        inputs: the model's keyword arguments; pixel values in fp32.
        positions: int64 [num_positions, 2], (row, column) of each compared position.
        logits: fp32 [num_positions, vocab].
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor
    logits: Tensor


def write_reference(loaded: LoadedModel, batches: Sequence[MicroBatch], path: Path) -> None:
    """Write inputs and logits of `batches` to `path` (safetensors), at the positions that predict a target token.

    Computed as anyone would who loads the result: eval mode, no autocast. A batch without targets is compared at its
    rows' last tokens. The model is left in eval mode.
    """
    loaded.model.eval()
    tower = base_model(loaded.model).get_submodule(loaded.spec.family.modules.towers[0])
    weight_dtype = next(tower.parameters()).dtype
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        positions = compared_positions(batch)
        moved = batch.to(loaded.device, weight_dtype)
        with torch.no_grad():
            hidden = loaded.spec.family.hidden_states(loaded.model, moved.model_inputs)
            rows, columns = positions.to(loaded.device).unbind(dim=1)
            logits = loaded.spec.family.logits(loaded.model, hidden[rows, columns])
        tensors[f"{index}.positions"] = positions.contiguous()
        tensors[f"{index}.logits"] = logits.float().cpu()
        for name, tensor in batch.model_inputs.items():
            tensors[f"{index}.inputs.{name}"] = tensor.contiguous().cpu()
    with explained_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"num_batches": json.dumps(len(batches))})


def read_reference(path: Path) -> Iterator[ReferenceBatch]:
    """The batches that `write_reference` wrote."""
    with safe_open(path, framework="pt") as reader:
        names = list(reader.keys())
        for index in range(json.loads(reader.metadata()["num_batches"])):
            prefix = f"{index}.inputs."
            yield ReferenceBatch(
                inputs={
                    name.removeprefix(prefix): reader.get_tensor(name) for name in names if name.startswith(prefix)
                },
                positions=reader.get_tensor(f"{index}.positions"),
                logits=reader.get_tensor(f"{index}.logits"),
            )


def compared_positions(batch: MicroBatch) -> Tensor:
    """int64 [n, 2]: (row, column) whose next token is a target, n at most MAX_POSITIONS; else each row's last token."""
    predicts_target = batch.labels[:, 1:] != IGNORE_INDEX
    positions = predicts_target.nonzero()[:MAX_POSITIONS]
    if len(positions):
        return positions
    num_tokens: Any = batch.model_inputs["attention_mask"].sum(dim=1)
    return torch.stack([torch.arange(len(num_tokens)), num_tokens - 1], dim=1)
