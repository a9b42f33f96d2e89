"""Gradient spikes: found where they are, and none cried where there are none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eightgig.train.spikes import MIN_STEPS, SpikeDetector


def spikes_of(norms: list[float]) -> list[int]:
    detector, found = SpikeDetector(), []
    for index, norm in enumerate(norms):
        if detector.is_spike(norm):
            found.append(index)
        detector.remember(norm)
    return found


@pytest.mark.parametrize("factor", [10, 100, 1e6])
@pytest.mark.parametrize("at", [MIN_STEPS, 100, 299])
def test_a_jump_is_found_and_nothing_else(factor: float, at: int) -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, 300))
    norms[at] = factor * np.median(norms)
    assert spikes_of(norms.tolist()) == [at]


def test_the_first_steps_raise_no_alarm() -> None:
    assert spikes_of([1.0] * (MIN_STEPS - 1) + [1e9]) == []
    falling = [100 * 0.8**step + 1 for step in range(200)]  # as norms do while the head of a loss curve falls
    assert spikes_of(falling) == []


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3, 0.8])
def test_ordinary_runs_raise_no_alarm(spread: float) -> None:
    """20,000 steps of log-normal norms, drifting by a factor of 20: fewer than one step in 2,000 may be called out."""
    norms = np.exp(np.random.default_rng(1).normal(0, spread, 20_000) + np.linspace(0, 3, 20_000))
    assert len(spikes_of(norms.tolist())) < 10


def test_a_higher_level_becomes_usual() -> None:
    found = spikes_of([1.0, 1.1, 0.9] * 20 + [50.0, 55.0, 45.0] * 40)
    assert found[0] == 60
    assert found[-1] < 60 + 64


def test_a_norm_of_zero_is_no_number_to_compare_with() -> None:
    assert spikes_of([0.0] * 100 + [1.0]) == []
    detector = SpikeDetector()
    assert detector.usual_norm is None
    for norm in [2.0] * MIN_STEPS:
        detector.remember(norm)
    assert detector.usual_norm is not None
    assert math.isclose(detector.usual_norm, 2.0)
