"""Restart: every jump goes to the data, which are then noised again to the next time (arXiv 2303.01469, algorithm 1).

    x0^ = x - t F(x, t, 0),   x_s = (1 - s) x0^ + s eps,   eps fresh

What a network that only knows jumps to 0 needs (consistency models). One step is one evaluation.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from omni.samplers.base import SAMPLERS, Call, Noise, Sampling, State


@SAMPLERS.register("restart", reads="data_jumps")
def restart(start: Tensor, times: list[float], noise: Noise) -> Sampling:
    """See samplers.base for the arguments; yields a State per jump, with the noise of its time."""
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times)):
        x = x - t * (yield Call(x, t, 0.0))
        if s > 0:
            x = (1 - s) * x + s * noise(n).to(x)
        yield State(n + 1, steps, s, x)
