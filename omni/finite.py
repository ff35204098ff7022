"""Values that must be finite: the logits, latents and pixels that a network computes.

They raise an error instead of a reply of "!!!!" or a black picture. Weights are checked on loading (omni.checkpoint);
training skips a step that is not finite (train.guard).
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from omni.errors import NotFiniteError


def in_range(values: Tensor, limit: float = sys.float_info.max) -> bool:
    """Whether every value is finite and at most `limit` in magnitude. One reduction; True for no values."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # both are NaN if any value is
    return -limit <= low.item() and high.item() <= limit


def require_finite(values: Tensor, what: str, way_out: str, limit: float = sys.float_info.max) -> None:
    """NotFiniteError naming `what` (a plural) and the worst value, unless `in_range`."""
    if in_range(values, limit):
        return
    low, high = (extreme.item() for extreme in torch.aminmax(values))
    worst = low if math.isnan(low) or -low > high else high
    found = f"reach {worst:g}, beyond {limit:g}" if math.isfinite(worst) else f"are not finite ({worst})"
    raise NotFiniteError(f"{what} {found}; {way_out}")
