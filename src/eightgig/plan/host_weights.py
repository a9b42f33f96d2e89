"""Frozen weights of a simulated run that lie on the host: they are left out of the record, their transfers counted.

A tower whose features are kept is among them: it comes to the card for computing these (`plan.cached_features`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from eightgig.memory.cached_tower import tower_of
from eightgig.memory.packed_layers import block_bytes, layer_places
from eightgig.memory.weight_ring import NUM_SLOTS, WeightRing, follow
from eightgig.models.host_weights import host_tables, streamed_layers
from eightgig.plan.categories import WEIGHTS_4BIT
from eightgig.plan.op_costs import PREFETCH, OpCost
from eightgig.plan.parts import weight_tensors
from eightgig.plan.recorder import Recorder
from eightgig.plan.trace import MemoryTrace

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec


class HostWeights:
    """Which weights of a fake model a configuration keeps on the host, and how the simulated run works with them."""

    def __init__(self, config: TrainingConfig, spec: ModelSpec, model: nn.Module, recorder: Recorder) -> None:
        """Find them.

        Raises:
            ConfigError: the model has fewer layers, or its head needs the table of embeddings on the GPU.
        """
        self._recorder = recorder
        self._layers = streamed_layers(config.hardware, spec, model)
        self._tables = host_tables(config.hardware, spec, model)
        self._sizes = [block_bytes(layer_places(layer)) for layer in self._layers]
        self._tower: list[tuple[Any, list[Tensor]]] = []  # weights, and what of each was recorded on loading
        if config.hardware.levers.cache_image_features:
            for weight in tower_of(model, spec.family).parameters():
                recorded = [tensor for tensor in weight_tensors(weight) if recorder.block_of(tensor) is not None]
                self._tower += [(weight, recorded)] if recorded else []

    @property
    def host_bytes(self) -> int:
        """What they take of the host's memory, the tower left out."""
        tables_bytes: int = sum(value.numel() * value.element_size() for value in self._table_weights())
        return sum(self._sizes) + tables_bytes

    def tensors(self) -> Iterator[Tensor]:
        """The weights and scales that don't lie on the GPU once they are loaded."""
        yield from self._table_weights()
        for _, tensors in self._tower:
            yield from tensors
        for layer in self._layers:
            for place in layer_places(layer):
                yield place.tensor

    def loading(self, loading: MemoryTrace) -> MemoryTrace:
        """A copy of the trace of loading everything onto the GPU, in which these weights leave it as they arrive."""
        freed: dict[int, list[int]] = {}
        leaving: list[tuple[Any, list[Tensor]]] = [(weight, [weight]) for weight in self._table_weights()]
        for layer in self._layers:
            weights: list[Any] = [place.owner for place in layer_places(layer) if place.name == "data"]
            leaving += [(weight, [weight, weight.quant_state.absmax]) for weight in weights]
        for weight, tensors in (*leaving, *self._tower):
            for tensor in tensors:
                block = self._recorder.block_of(tensor)
                assert block is not None
                freed.setdefault(weight.arrived_event, []).append(block)
        return loading.with_freed(freed) if freed else loading.copy()

    def engage(self) -> list[RemovableHandle]:
        """Have the model work with them, by hooks and by wrapped forwards; to be called while the run is loading."""
        for table in self._tables:
            table.forward = _looked_up(table.forward, self._recorder)
        if not self._layers:
            return []
        mode = next(self.tensors()).fake_mode  # type: ignore[attr-defined]
        with mode, self._recorder:
            slots = [torch.empty(max(self._sizes), dtype=torch.uint8) for _ in range(NUM_SLOTS)]
        self._recorder.label(slots, WEIGHTS_4BIT)
        return follow(self._layers, WeightRing(len(self._layers), _Counted(self._recorder, self._sizes, slots)))

    def _table_weights(self) -> list[Any]:
        return [parameter for table in self._tables for parameter in table.parameters()]


class _Counted:
    """Brings no bytes, and counts them."""

    def __init__(self, recorder: Recorder, sizes: Sequence[int], slots: Sequence[Tensor]) -> None:
        self._recorder = recorder
        self._sizes = sizes
        self._slots = slots  # held as long as the hooks are

    def start(self, layer: int, slot: int) -> None:
        """See `memory.weight_ring.Carrier`."""
        self._recorder.count(OpCost(PREFETCH, torch.uint8, 0, self._sizes[layer]))

    def finish(self, slot: int) -> None:
        """See `memory.weight_ring.Carrier`: waiting allocates nothing."""


def _looked_up(forward: Callable[..., Tensor], recorder: Recorder) -> Callable[..., Tensor]:
    """The rows are gathered on the host, unrecorded; what arrives on the GPU is."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        with recorder.paused():
            rows = forward(*args, **kwargs)
        return recorder.received(rows)

    return wrapped
