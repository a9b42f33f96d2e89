"""Gradient norms that stand out from those of the steps before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW_STEPS = 64
MIN_STEPS = 20  # before there are so many, a median says little, and the warm-up changes the norm by itself
MIN_SCORE = 5.0
MIN_RATIO = 3.0  # of a run whose norms hardly differ, every small change would stand out
SCORE_SCALE = 0.6745  # the 75th percentile of the normal distribution: makes MAD comparable to a standard deviation


class SpikeDetector:
    """Tells spikes by the modified z-score of the logarithm of the gradient norm, over the last `WINDOW_STEPS` steps.

    Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993), as in NIST's Engineering Statistics Handbook,
    1.3.5.17: median and median absolute deviation, which earlier spikes do not move. They call 3.5 an outlier, for one
    look at a sample; a run looks thousands of times, and of 20,000 log-normal norms 27 were called out at 3.5. The
    logarithm, because norms spread by factors; and at least `MIN_RATIO` times the median.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=WINDOW_STEPS)

    @property
    def usual_norm(self) -> float | None:
        """The median of the norms before; None while there are too few."""
        return math.exp(median(self._logs)) if len(self._logs) >= MIN_STEPS else None

    def remember(self, grad_norm: float) -> None:
        """Count `grad_norm` (finite) among those that later ones are compared with."""
        if grad_norm > 0:
            self._logs.append(math.log(grad_norm))

    def is_spike(self, grad_norm: float) -> bool:
        """Whether `grad_norm` (finite) stands out from those remembered."""
        if grad_norm <= 0 or len(self._logs) < MIN_STEPS:
            return False
        middle = median(self._logs)
        spread = median(abs(other - middle) for other in self._logs)
        above = math.log(grad_norm) - middle
        return above > math.log(MIN_RATIO) and SCORE_SCALE * above > MIN_SCORE * spread
