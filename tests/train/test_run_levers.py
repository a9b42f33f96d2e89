"""Which lever comes next: exact ones first, none without use, none twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config import TrainingConfig
from eightgig.plan.chosen_levers import TILE_TOKENS
from eightgig.train.run_levers import LOSS_CHUNK_TOKENS, PassSize, RunLevers, Work, next_levers

PLAIN = RunLevers.of(TrainingConfig.model_validate({"hardware": {"checkpointed_layers": 3}}))
LONG = PassSize(num_samples=5, num_tokens=TILE_TOKENS + 1, num_target_tokens=LOSS_CHUNK_TOKENS + 1)


def _all(work: Work, size: PassSize, levers: RunLevers = PLAIN, *, can_tile: bool = True) -> list[RunLevers]:
    """The levers one after another, until none is left."""
    found = []
    while (following := next_levers(levers, work, size, can_tile=can_tile)) is not None:
        levers = following[1]
        found.append(levers)
        if levers.samples_at_once is not None:
            size = replace(size, num_samples=levers.samples_at_once)
        assert len(found) < 20
    return found


def test_the_whole_way_of_a_step() -> None:
    ways = _all("train", LONG)
    exact = replace(PLAIN, checkpointed_layers=None)
    offloaded = replace(exact, offload_layer_inputs=True)
    chunked = replace(offloaded, loss_chunk_tokens=LOSS_CHUNK_TOKENS)
    single = replace(chunked, samples_at_once=1)
    assert ways == [
        exact,
        offloaded,
        chunked,
        replace(chunked, samples_at_once=3),
        replace(chunked, samples_at_once=2),
        single,
        replace(single, mlp_tile_tokens=TILE_TOKENS),
    ]


def test_a_validation_keeps_no_graph_and_a_save_has_no_levers() -> None:
    for levers in _all("validate", LONG):
        assert (levers.checkpointed_layers, levers.offload_layer_inputs) == (3, False)
    assert _all("save", LONG) == []


def test_whole_layers_are_checkpointed_first() -> None:
    plain = RunLevers.of(TrainingConfig.model_validate({"hardware": {"gradient_checkpointing": False}}))
    first = _all("train", LONG, plain)[0]
    assert first == replace(plain, gradient_checkpointing=True)


@given(
    num_samples=st.integers(1, 9),
    num_tokens=st.integers(1, 2 * TILE_TOKENS),
    num_target_tokens=st.integers(1, 2 * LOSS_CHUNK_TOKENS),
    can_tile=st.booleans(),
)
def test_what_changes_nothing_is_left_out(
    num_samples: int, num_tokens: int, num_target_tokens: int, can_tile: bool
) -> None:
    ways = _all("train", PassSize(num_samples, num_tokens, num_target_tokens), can_tile=can_tile)
    last = ways[-1]
    assert (last.loss_chunk_tokens == LOSS_CHUNK_TOKENS) == (num_target_tokens > LOSS_CHUNK_TOKENS)
    assert last.samples_at_once == (1 if num_samples > 1 else None)
    assert (last.mlp_tile_tokens is not None) == (can_tile and num_tokens > TILE_TOKENS)


@pytest.mark.parametrize("levers", [PLAIN, *_all("train", LONG)])
def test_levers_reach_the_settings_that_the_layers_read(levers: RunLevers) -> None:
    config = levers.in_config(TrainingConfig())
    again = replace(
        RunLevers.of(config), loss_chunk_tokens=levers.loss_chunk_tokens, samples_at_once=levers.samples_at_once
    )
    assert again == levers
