"""Heun's method on the instantaneous velocity u = F(x, t, t): of second order (arXiv 2206.00364, algorithm 1).

    x' = x + (s - t) u(x, t),   x_s = x + (s - t) (u(x, t) + u(x', s)) / 2

Two evaluations per step, one for the last, which is an Euler step: 2 n - 1 for n steps.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from omni.samplers.base import SAMPLERS, Call, Noise, Sampling, State


@SAMPLERS.register("heun", reads="velocity")
def heun(start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
    """See samplers.base for the arguments; yields a State per step."""
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times), 1):
        velocity = yield Call(x, t, t)
        if n < steps:
            velocity = (velocity + (yield Call(x + (s - t) * velocity, s, s))) / 2
        x = x + (s - t) * velocity
        yield State(n, steps, s, x)
