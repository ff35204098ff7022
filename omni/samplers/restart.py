"""Restart: every jump goes to the data, which are then noised again to the next time (arXiv 2303.01469, algorithm 1).

    x0^ = x - t F(x, t, 0),   x_s = (1 - s) x0^ + s eps,   eps fresh

What a network that only knows jumps to 0 needs (consistency models). One step is one evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, Noise, State, Velocity


@SAMPLERS.register("restart")
def restart(call: Velocity, start: Tensor, times: list[float], noise: Noise) -> Iterator[State]:
    """See samplers.schedule for the arguments; yields a State per jump, noised to its time."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x - t * call(x.to(start.dtype), t, 0.0).double()
        if s > 0:
            x = (1 - s) * x + s * noise(n).to(x)
        yield State(n + 1, steps, s, x)
