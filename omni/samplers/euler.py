"""Euler on the instantaneous velocity F(x, t, t): x <- x + (s - t) F. On this linear path it is DDIM with
x0^ = x - t F and eps^ = x + (1 - t) F (arXiv 2010.02502): both print the same number, a test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, State


@SAMPLERS.register("euler")
def euler(call: Callable[[Tensor, float, float], Tensor], start: Tensor, times: list[float]) -> Iterator[State]:
    """`start` at times[0]; `call(x, t, s)` returns F of x's shape. Yields a State per step; the last is the answer."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (s - t) * call(x.to(start.dtype), t, t).double()
        yield State(n + 1, steps, s, x)


@SAMPLERS.register("ddim")
def ddim(call: Callable[[Tensor, float, float], Tensor], start: Tensor, times: list[float]) -> Iterator[State]:
    """The same step told through data and noise predictions: x_s = (1 - s) x0^ + s eps^."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity = call(x.to(start.dtype), t, t).double()
        x = (1 - s) * (x - t * velocity) + s * (x + (1 - t) * velocity)
        yield State(n + 1, steps, s, x)
