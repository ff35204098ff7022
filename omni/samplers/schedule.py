"""The refinement axis: grids of times from noise (1) to data (0), and the state a sampler yields after each jump."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni.config import Registry

SAMPLERS: Registry = Registry("sampler")


@dataclass(frozen=True)
class State:
    """After jump `step` of `steps`: the block at time `t`. x is float64, of the start's shape."""

    step: int
    steps: int
    t: float
    x: Tensor


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 1 to 0, uniform, then warped by k t / (1 + (k - 1) t) (k = `shift` > 1 lingers at noise).

    Raises ValueError if steps < 1 or shift <= 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}; one step is a single jump from noise to data")
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}; 1 is the uniform grid")
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * uniform / (1 + (shift - 1) * uniform)).tolist()
