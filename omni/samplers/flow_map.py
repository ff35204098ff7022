"""Flow-map jumps: the network is told where the jump ends, x <- x + (s - t) F(x, t, s). Exact in any number of steps
for the exact map; one step is one evaluation. Also called pushforward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, Noise, State, Velocity


@SAMPLERS.register("flow_map")
def flow_map(call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None) -> Iterator[State]:
    """See samplers.schedule for the arguments; yields a State per jump."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (s - t) * call(x.to(start.dtype), t, s).double()
        yield State(n + 1, steps, s, x)
