"""The ring beside a model of a GPU's streams: in each pass the right weights are there, and none in use is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config.fields import MIN_STREAMED_LAYERS
from eightgig.memory.weight_ring import NUM_SLOTS, WeightRing, streamed_positions


class Carried:
    """Transfers that end when they may last: from `start` until `finish` a slot holds garbage."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.in_use: int | None = None
        self.starts: list[int] = []

    def start(self, layer: int, slot: int) -> None:
        assert slot != self.in_use
        self.begun[slot] = layer
        self.held.pop(slot, None)
        self.starts.append(layer)

    def finish(self, slot: int) -> None:
        if slot in self.begun:
            self.held[slot] = self.begun.pop(slot)
        self.in_use = slot


class Passes:
    """Runs passes over a ring and checks at each layer what its slot holds."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.num_checked = 0
        self.carried = Carried()
        self.ring = WeightRing(num_layers, self.carried)

    def check(self, layer: int) -> None:
        """The layer's weights are there; when this returns its work is issued, and a copy waits for that."""
        slot = layer % min(NUM_SLOTS, self.num_layers)
        assert self.carried.held.get(slot) == layer
        assert self.carried.in_use == slot
        self.carried.in_use = None
        self.num_checked += 1

    def forward(self, *, with_gradients: bool) -> None:
        with torch.set_grad_enabled(with_gradients):
            for layer in range(self.num_layers):
                self.ring.enter_forward(layer)
                self.check(layer)

    def backward(self, until: int = 0) -> None:
        for layer in reversed(range(until, self.num_layers)):
            self.ring.enter_backward(layer)
            self.check(layer)


@given(
    num_layers=st.integers(1, 9),
    passes=st.lists(
        st.tuples(st.sampled_from(["train", "validate", "upper layers alone"]), st.integers(0, 8)), max_size=6
    ),
)
def test_whatever_the_order_of_passes_each_layer_finds_its_weights(
    num_layers: int, passes: list[tuple[str, int]]
) -> None:
    run = Passes(num_layers)
    for kind, until in passes:
        run.forward(with_gradients=kind != "validate")
        if kind == "train":
            run.backward()
        elif kind == "upper layers alone":
            run.backward(min(until, num_layers - 1))
    assert run.num_checked == sum(
        {"train": 2 * num_layers, "validate": num_layers}.get(kind, 2 * num_layers - min(until, num_layers - 1))
        for kind, until in passes
    )


@given(num_layers=st.integers(MIN_STREAMED_LAYERS, 40))
def test_a_micro_batch_moves_each_layer_twice_but_for_those_at_the_turns(num_layers: int) -> None:
    run = Passes(num_layers)
    run.forward(with_gradients=True)
    run.backward()
    run.carried.starts.clear()
    run.forward(with_gradients=True)
    run.backward()
    assert sorted(run.carried.starts) == sorted([*range(2, num_layers), *range(num_layers - 2)])
    assert len(run.carried.starts) == 2 * (num_layers - NUM_SLOTS)


@given(num_layers=st.integers(2, 40))
def test_the_next_layer_is_on_its_way_while_one_is_computed(num_layers: int) -> None:
    run = Passes(num_layers)
    for layer in range(num_layers - 1):
        run.ring.enter_forward(layer)
        assert layer + 1 in (*run.carried.begun.values(), *run.carried.held.values())
    for layer in reversed(range(1, num_layers)):
        run.ring.enter_backward(layer)
        assert layer - 1 in (*run.carried.begun.values(), *run.carried.held.values())


def test_after_a_copy_that_failed_the_layer_is_sent_for_again() -> None:
    class Failing(Carried):
        fails = False

        def start(self, layer: int, slot: int) -> None:
            if self.fails:
                raise RuntimeError("out of memory")
            super().start(layer, slot)

    carried = Failing()
    ring = WeightRing(4, carried)
    ring.enter_forward(0)
    carried.fails, carried.in_use = True, None
    with pytest.raises(RuntimeError):
        ring.enter_forward(2)
    carried.fails = False
    ring.enter_forward(0)
    assert carried.held[0] == 0
    assert carried.starts.count(0) == 2


@given(st.data())
def test_streamed_layers_are_spread_evenly(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 80))
    num_streamed = data.draw(st.integers(1, num_layers))
    places = streamed_positions(num_layers, num_streamed)
    assert len(set(places)) == num_streamed
    assert list(places) == sorted(places)
    assert places[-1] == num_layers - 1
    gaps = {after - before for before, after in zip((-1, *places), places, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_more_layers_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 streamed layers of 6"):
        streamed_positions(6, 7)
    assert streamed_positions(6, 0) == ()
