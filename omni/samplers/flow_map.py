"""Flow-map jumps: the network is told where the jump ends, x <- x + (s - t) F(x, t, s). Exact in any number of steps
for the exact map; one step is one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, State


@SAMPLERS.register("flow_map")
def flow_map(call: Callable[[Tensor, float, float], Tensor], start: Tensor, times: list[float]) -> Iterator[State]:
    """`start` at times[0]; `call(x, t, s)` returns F of x's shape. Yields a State per jump; the last is the answer."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (s - t) * call(x.to(start.dtype), t, s).double()
        yield State(n + 1, steps, s, x)
