"""Non-finite guard: a NaN or infinity in the loss or the gradient norm never reaches the weights.

Such a step is skipped (weights, optimiser and averages stay the same), counted, and reported with the indices of its
documents. Too many in a row stop the run with exit code 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class TooManyNonFinite(RuntimeError):
    """The run met `limit` non-finite steps in a row."""


@dataclass
class Guard:
    limit: int = 10
    num_skipped: int = 0
    num_in_row: int = 0

    def accepts(self, step: int, loss: float, grad_norm: float, documents: Sequence[int]) -> bool:
        """Whether the optimiser may take this step. Raises TooManyNonFinite at `limit` skipped steps in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.num_in_row = 0
            return True
        self.num_skipped += 1
        self.num_in_row += 1
        if self.num_in_row >= self.limit:
            span = f"{documents[0]}..{documents[-1]}" if documents else "none"
            raise TooManyNonFinite(
                f"{self.limit} steps in a row were not finite; the last is step {step}: loss {loss}, "
                f"gradient norm {grad_norm}, documents {span}; lower optimiser.rate or look at these documents"
            )
        return False
