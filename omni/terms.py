"""Terms: a loss as a sum and a count, divided once, by the global count, by whoever adds them up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """A loss as (sum, count): the trainer divides once, by the global count. `weight` multiplies it in the total."""

    sum: Tensor
    count: float
    weight: float = 1.0
