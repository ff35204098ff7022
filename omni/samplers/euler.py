"""Euler on the instantaneous velocity F(x, t, t): x <- x + (s - t) F. On this linear path it is DDIM with
x0^ = x - t F and eps^ = x + (1 - t) F (arXiv 2010.02502): a test compares the two."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from omni.samplers.base import SAMPLERS, Call, Noise, Sampling, State


@SAMPLERS.register("euler", reads="velocity")
def euler(start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
    """One evaluation per step. See samplers.base for the arguments; yields a State per step."""
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times), 1):
        x = x + (s - t) * (yield Call(x, t, t))
        yield State(n, steps, s, x)


@SAMPLERS.register("ddim", reads="velocity")
def ddim(start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
    """The same step, written with the predictions of data and noise: x_s = (1 - s) x0^ + s eps^."""
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times), 1):
        velocity = yield Call(x, t, t)
        x = (1 - s) * (x - t * velocity) + s * (x + (1 - t) * velocity)
        yield State(n, steps, s, x)
