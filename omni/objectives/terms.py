"""Terms: a loss as a sum and a count. The trainer adds them up and divides once, by the global count."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """A loss as (sum, count): the trainer divides once, by the global count. `weight` multiplies it in the total.

    raw: the sum of the same errors without weights that depend on them or on the time, for the log only; None if it
    equals `sum`.
    """

    sum: Tensor
    count: float
    weight: float = 1.0
    raw: Tensor | None = None
