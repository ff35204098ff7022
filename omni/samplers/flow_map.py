"""Flow-map jumps: the network reads where the jump ends, x <- x + (s - t) F(x, t, s). Exact in any number of steps
for the exact map; one step is one evaluation. Also called pushforward."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from omni.samplers.base import SAMPLERS, Call, Noise, Sampling, State


@SAMPLERS.register("flow_map", reads="grid_jumps")
def flow_map(start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
    """See samplers.base for the arguments; yields a State per jump."""
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times), 1):
        x = x + (s - t) * (yield Call(x, t, s))
        yield State(n, steps, s, x)
