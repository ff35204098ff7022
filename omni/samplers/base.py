"""What a sampler is: a generator that asks for F(x, t, s) and reports the block after each jump. It calls no model.

    def euler(start, times, noise=None, **knobs):
        x, steps = start, len(times) - 1
        for n, (t, s) in enumerate(pairwise(times), 1):
            F = yield Call(x, t, t)          # the driver answers with F, of x's shape, in float64
            x = x + (s - t) * F
            yield State(n, steps, s, x)      # after every jump; the last item

    start       the block at times[0], of any shape, in float64
    times       floats, strictly decreasing, from `time_grid`
    noise(n)    standard normal of start's shape for jump n = 0, 1, ...; a pure function, so that the same seed gives
                the same picture alone and in a batch. A sampler that needs it gives it no default
    knobs       options of this sampler alone, with defaults

Whoever drives a sampler evaluates F. `run_sampler` drives one with a callable. An engine holds one generator per
request and evaluates the calls of all of them, at any (t, s), in one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from omni.registry import Registry


@dataclass(frozen=True)
class Call:
    """The evaluation that a sampler waits for: F(x, t, s), the average velocity from t to s; the instantaneous one at
    s = t. x is float64, of the start's shape; so must be the answer."""

    x: Tensor
    t: float
    s: float


@dataclass(frozen=True)
class State:
    """After jump `step` of `steps`: the block at time `t`. x is float64, of the start's shape."""

    step: int
    steps: int
    t: float
    x: Tensor


Velocity = Callable[[Tensor, float, float], Tensor]
Noise = Callable[[int], Tensor]
Sampling = Generator[Call | State, Tensor, None]  # `send` the answer to a Call; `next` after a State
Sampler = Callable[..., Sampling]

SAMPLERS: Registry[Sampler] = Registry("sampler", "omni.samplers", entry_points="omni.samplers")


def run_sampler(
    sampler: Sampler, call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None, **knobs: Any
) -> Iterator[State]:
    """The states of a sampler whose F is `call`, a callable of (x, t, s). x has the dtype of `start`.

    Raises TypeError for a knob that the sampler does not have, and without the noise that it needs.
    """
    given = {} if noise is None else {"noise": noise}
    return _states(sampler(start.double(), times, **given, **knobs), call, start.dtype)


def _states(sampling: Sampling, call: Velocity, dtype: torch.dtype) -> Iterator[State]:
    item = next(sampling, None)
    while item is not None:
        if isinstance(item, State):
            yield item
            item = next(sampling, None)
        else:
            item = sampling.send(call(item.x.to(dtype), item.t, item.s).double())


def adds_noise(sampler: str) -> bool:
    """Whether a sampler draws noise on the way: then `noise` has no default."""
    return inspect.signature(SAMPLERS.get(sampler)).parameters["noise"].default is inspect.Parameter.empty


def knobs(sampler: str) -> list[str]:
    """The options of a sampler beyond start, times and noise."""
    return list(inspect.signature(SAMPLERS.get(sampler)).parameters)[3:]


def _known(name: str) -> str:
    SAMPLERS.get(name)
    return name


SamplerName = Annotated[str, AfterValidator(_known)]  # a field of options: an unknown name is an error
