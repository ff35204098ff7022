"""Euler on the instantaneous velocity F(x, t, t): x <- x + (s - t) F. On this linear path it is DDIM with
x0^ = x - t F and eps^ = x + (1 - t) F (arXiv 2010.02502): both print the same number, a test says so."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omni.samplers.schedule import SAMPLERS, Noise, State, Velocity


@SAMPLERS.register("euler")
def euler(call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None) -> Iterator[State]:
    """One evaluation per step. See samplers.schedule for the arguments; yields a State per step."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = x + (s - t) * call(x.to(start.dtype), t, t).double()
        yield State(n + 1, steps, s, x)


@SAMPLERS.register("ddim")
def ddim(call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None) -> Iterator[State]:
    """The same step told through data and noise predictions: x_s = (1 - s) x0^ + s eps^."""
    x = start.double()
    steps = len(times) - 1
    for n, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        velocity = call(x.to(start.dtype), t, t).double()
        x = (1 - s) * (x - t * velocity) + s * (x + (1 - t) * velocity)
        yield State(n + 1, steps, s, x)
