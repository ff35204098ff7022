"""Gamma: from one time to the next by way of a cleaner one, then noise (CTM, arXiv 2310.02279, algorithm 3).

There, noise has deviation eta and data are not scaled: y = x / (1 - t), eta(t) = t / (1 - t). A jump ends at
sqrt(1 - gamma^2) eta(s) and noise of deviation gamma eta(s) is added, so that the variances sum to eta(s)^2. Here:

    x_s = (1 - s) / (1 - m) f(x_t, t, m) + gamma s eps,   eta(m) = sqrt(1 - gamma^2) eta(s)

gamma = 0 is the flow-map sampler (m = s, no noise), gamma = 1 is restart (m = 0). One step is one evaluation.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from omni.samplers.base import SAMPLERS, Call, Noise, Sampling, State


@SAMPLERS.register("gamma", reads="jumps")
def gamma(start: Tensor, times: list[float], noise: Noise, gamma: float = 0.5) -> Sampling:
    """See samplers.base for the arguments; yields a State per jump. ValueError if gamma is outside [0, 1]."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}; 0 adds no noise, 1 is restart")
    x, kept, steps = start, math.sqrt(1 - gamma**2), len(times) - 1
    for n, (t, s) in enumerate(pairwise(times)):
        middle = kept * s / (1 - s + kept * s)
        x = x + (middle - t) * (yield Call(x, t, middle))
        if s > 0 and gamma > 0:
            x = (1 - s) / (1 - middle) * x + gamma * s * noise(n).to(x)
        yield State(n + 1, steps, s, x)
