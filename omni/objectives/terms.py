"""Terms: a loss as a sum and a count, divided once, by the global count, by whoever adds them up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """A loss as (sum, count): the trainer divides once, by the global count. `weight` multiplies it in the total.

    raw: the sum of the same errors without weights that depend on them or on the time, for the log alone; None where
    it is `sum`.
    """

    sum: Tensor
    count: float
    weight: float = 1.0
    raw: Tensor | None = None
