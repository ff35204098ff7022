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
    knobs       options of this sampler alone, with defaults, for callers of `run_sampler`; requests have `gamma` only

`@SAMPLERS.register("euler", reads="velocity")` says which values of F it asks for (`Reads`). Recipes take a sampler for
objectives that train these values (Objective.trains).

Whoever drives a sampler evaluates F. `run_sampler` drives one with a callable. An engine holds one generator per
request and evaluates the calls of all of them, at any (t, s), in one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

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

# Values of F: F(x, t, t); F(x, t, s) from one time of a grid to the next; for any s <= t; F(x, t, 0).
Reads = Literal["velocity", "grid_jumps", "jumps", "data_jumps"]


class SamplerRegistry(Registry[Sampler]):
    """Samplers, and the values of F that they ask for."""

    def __init__(self) -> None:
        super().__init__("sampler", "omni.samplers", entry_points="omni.samplers")
        self._reads: dict[str, Reads] = {}

    @property
    def reads(self) -> dict[str, Reads]:
        """What each sampler reads; of installed packages, those that have been asked for."""
        self.names()  # imports the samplers of this package
        return self._reads

    def register(self, name: str, reads: Reads) -> Callable[[Any], Any]:  # type: ignore[override]
        """Decorator for a generator function f(start, times, noise). ValueError for anything else."""
        add = super().register(name)
        if reads not in get_args(Reads):
            raise ValueError(f"sampler {name!r}: reads = {reads!r}; known: {', '.join(get_args(Reads))}")

        def checked(sampler: Any) -> Any:
            given = list(inspect.signature(sampler).parameters)
            if not inspect.isgeneratorfunction(sampler) or given[2:3] != ["noise"]:
                raise ValueError(
                    f"sampler {name!r} must be a generator function f(start, times, noise) that yields Call and State, "
                    f"see omni.samplers.base; it is {sampler.__name__}({', '.join(given)})"
                )
            self._reads[name] = reads
            return add(sampler)

        return checked


SAMPLERS = SamplerRegistry()


def run_sampler(
    sampler: Sampler, call: Velocity, start: Tensor, times: list[float], noise: Noise | None = None, **knobs: Any
) -> Iterator[State]:
    """The states of a sampler whose F is `call`, a callable of (x, t, s). x has the dtype of `start`.

    Raises TypeError for a knob that the sampler does not have, and without the noise that it needs; ValueError where
    the answer of `call` has another shape than its x.
    """
    given = {} if noise is None else {"noise": noise}
    return _states(sampler(start.double(), times, **given, **knobs), call, start.dtype, times[-1])


def _states(sampling: Sampling, call: Velocity, dtype: torch.dtype, end: float) -> Iterator[State]:
    """`run_sampler` of a started sampler. ValueError unless it ends at the time `end`."""
    item, reached = next(sampling, None), None
    while item is not None:
        if isinstance(item, State):
            yield item
            item, reached = next(sampling, None), item.t
        else:
            velocity = call(item.x.to(dtype), item.t, item.s)
            if velocity.shape != item.x.shape:
                found, wanted = tuple(velocity.shape), tuple(item.x.shape)
                raise ValueError(f"F(x, t, s) has the shape {found}, not that of x, {wanted}; return a value for each")
            item = next(_answered(sampling, velocity.double()), None)
    if reached != end:
        raise ValueError(f"the sampler ended at time {reached}, not at {end}: it must yield a State there")


def _answered(sampling: Sampling, velocity: Tensor) -> Iterator[Call | State]:
    """What the sampler yields after an answer, if anything."""
    with suppress(StopIteration):
        yield sampling.send(velocity)


def adds_noise(sampler: str) -> bool:
    """Whether a sampler draws noise on the way: then `noise` has no default."""
    return inspect.signature(SAMPLERS.get(sampler)).parameters["noise"].default is inspect.Parameter.empty


def knobs(sampler: str) -> list[str]:
    """The options of a sampler beyond start, times and noise."""
    return list(inspect.signature(SAMPLERS.get(sampler)).parameters)[3:]


def _known(name: str) -> str:
    """`name`, if a sampler has it."""
    SAMPLERS.get(name)
    return name


SamplerName = Annotated[str, AfterValidator(_known)]  # a field of options: an unknown name is an error
