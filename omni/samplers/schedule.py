"""The refinement axis: grids of times from noise (1) to data (0).

A grid is a function of (steps, start) that returns steps + 1 decreasing times. start: the first time, or None. A grid
that fixes its number of steps gives `steps` that default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch

from omni.registry import Registry

Grid = Callable[[int, float | None], list[float]]

GRIDS: Registry[Grid] = Registry("grid", "omni.samplers", entry_points="omni.grids")


def time_grid(
    steps: int, shift: float = 1.0, grid: str | Sequence[float] = "uniform", start: float | None = None
) -> list[float]:
    """`steps` + 1 times from noise to data (0), in float64.

    Args:
        steps: jumps; see `num_steps` for grids that fix it.
        shift: warps by k t / (1 + (k - 1) t), k > 1 lingers at noise; both ends stay.
        grid: a name of GRIDS, or the times themselves (strictly decreasing, within [0, 1], the last one 0).
        start: the first time. None: the grid's own. Maps trained by IMM start at .994 (arXiv 2503.07565).

    Raises ValueError, naming the value, for anything else.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; one step is a single jump from noise to data")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; 1 is the uniform grid")
    if start is not None and not 0 < start <= 1:
        raise ValueError(f"the start time must be in (0, 1], got {start}; 1 is noise, and the usual start")
    fixed = num_steps(grid)
    if fixed is not None and steps != fixed:
        raise ValueError(f"the grid {_name(grid)} has {fixed} steps, got steps = {steps}; leave one of the two out")
    if isinstance(grid, str):
        return _warped(GRIDS.get(grid)(steps, start), shift)
    if shift != 1 or start is not None:
        name, value = ("shift", shift) if shift != 1 else ("start time", start)
        raise ValueError(f"the times {_name(grid)} are used as they are; leave the {name} {value} out, or name a grid")
    return _checked(grid)


def num_steps(grid: str | Sequence[float]) -> int | None:
    """The number of steps a grid fixes, or None where any number will do. ValueError for an unknown name."""
    if not isinstance(grid, str):
        return max(len(grid) - 1, 1)
    fixed = inspect.signature(GRIDS.get(grid)).parameters["steps"].default
    return None if fixed is inspect.Parameter.empty else fixed


@GRIDS.register("uniform")
def _uniform(steps: int, start: float | None) -> list[float]:
    """Equal steps of t."""
    return torch.linspace(1.0 if start is None else start, 0, steps + 1, dtype=torch.float64).tolist()


@GRIDS.register("edm")
def _edm(steps: int, start: float | None) -> list[float]:
    """Uniform in eta^(1/7), eta = t / (1 - t), from 80 (t = .9877) to .002, then 0 (arXiv 2206.00364, equation 5)."""
    if start == 1:
        raise ValueError("the grid 'edm' cannot start at 1, where eta = t / (1 - t) is infinite; try 0.994")
    rho, lowest, highest = 7, 0.002, 80.0 if start is None else start / (1 - start)
    ends = torch.tensor([highest, min(lowest, highest / 2)], dtype=torch.float64) ** (1 / rho)
    part = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    eta = (ends[0] + part * (ends[1] - ends[0])) ** rho
    times = [*(eta / (1 + eta)).tolist(), 0.0]
    return times if start is None else [start, *times[1:]]


@GRIDS.register("midpoint")
def _midpoint(steps: int = 2, start: float | None = None) -> list[float]:
    """Two jumps that meet at eta = 1.4, t = .5833: IMM's two-step grid (arXiv 2503.07565)."""
    first, middle = 1.0 if start is None else start, 1.4 / 2.4
    if first <= middle:
        raise ValueError(f"the grid 'midpoint' stops at {middle:.4f}, so it cannot start at {first}; start later")
    return [first, middle, 0.0]


def _warped(times: list[float], shift: float) -> list[float]:
    """The times warped by `shift`; both ends stay."""
    if shift == 1:
        return times
    first, part = times[0], torch.tensor(times, dtype=torch.float64) / times[0]
    return [first, *(first * (shift * part / (1 + (shift - 1) * part)))[1:].tolist()]


def _checked(times: Sequence[float]) -> list[float]:
    """The times as floats. ValueError unless they decrease from at most 1 to 0."""
    found = [float(t) for t in times]
    if len(found) < 2 or not 0 < found[0] <= 1 or found[-1] != 0:
        raise ValueError(f"the times {_name(times)} must go from noise (at most 1) to data (0); for example 1, 0.58, 0")
    for before, after in zip(found[:-1], found[1:], strict=True):
        if not after < before:
            raise ValueError(f"the times {_name(times)} must decrease, and {after} follows {before}")
    return found


def _name(grid: str | Sequence[float]) -> str:
    """A grid in an error: its name, or its times in short."""
    if isinstance(grid, str):
        return repr(grid)
    shown = [str(round(float(t), 6)) for t in grid]
    return f"[{', '.join(shown if len(shown) <= 9 else [*shown[:6], '...', *shown[-2:]])}]"
