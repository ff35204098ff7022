"""Heun's method on the instantaneous velocity u = F(x, t, t): of second order (arXiv 2206.00364, algorithm 1).

    x' = x + (s - t) u(x, t),   x_s = x + (s - t) (u(x, t) + u(x', s)) / 2

Two evaluations per step, one for the last, which is an Euler step: 2 n - 1 for n steps.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, Noise, State, Velocity


@SAMPLERS.register("heun")
def heun(call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None) -> Iterator[State]:
    """See samplers.schedule for the arguments; yields a State per step."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity = call(x.to(start.dtype), t, t).double()
        if n + 1 < steps:
            ahead = x + (s - t) * velocity
            velocity = (velocity + call(ahead.to(start.dtype), s, s).double()) / 2
        x = x + (s - t) * velocity
        yield State(n + 1, steps, s, x)
