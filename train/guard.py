"""Non-finite guard: a NaN or infinity in the loss or the gradient norm never reaches the weights.

Such a step is skipped (weights, optimiser and averages stay as they were), counted, and reported with the indices
of its documents; too many in a row stop the run with exit code 3. `DeviceGuard` does as much without waiting for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class TooManyNonFinite(RuntimeError):
    """The run met `limit` non-finite steps in a row."""


@dataclass
class Guard:
    """Counts steps that are not finite. limit: of them in a row. The counts are saved in checkpoints."""

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


class DeviceGuard:
    """Refuses steps by their gradient norm and counts them, all on the device: the host learns of them late.

    limit: more refusals than this, in a row or not, are too many.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.num_skipped = torch.zeros((), device=device)
        self._seen = torch.zeros((), pin_memory=device.type == "cuda")  # of a step or two ago

    def refuses(self, norm: Tensor) -> Tensor:
        """1.0 where the norm is not finite, else 0.0: see Optimiser.step."""
        wrong = (~norm.isfinite()).float()
        self.num_skipped += wrong
        self._seen.copy_(self.num_skipped, non_blocking=True)
        return wrong

    @property
    def too_many(self) -> bool:
        """Whether more steps than `limit` were refused, as known to the host a step or two late."""
        return float(self._seen) > self.limit

    def restart(self) -> None:
        """Set the counts to zero."""
        self.num_skipped.zero_()
        self._seen.zero_()
