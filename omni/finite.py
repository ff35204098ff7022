"""Values that must be finite: what a network computes where it is used, that is logits, latents and pixels.

An error, not a reply of "!!!!" or a black picture. Weights are checked when they are loaded (omni.checkpoint); training
skips a step that is not finite (train.guard).
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from omni.errors import NotFiniteError


def in_range(values: Tensor, limit: float = sys.float_info.max) -> bool:
    """Whether every value is finite and at most `limit` in size. One reduction; True for no values at all."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # either is NaN where any value is
    return -limit <= low.item() and high.item() <= limit


def require_finite(values: Tensor, what: str, way_out: str, limit: float = sys.float_info.max) -> None:
    """NotFiniteError that names `what` (a plural) and the worst value, unless `in_range`."""
    if in_range(values, limit):
        return
    low, high = (extreme.item() for extreme in torch.aminmax(values))
    worst = low if math.isnan(low) or -low > high else high
    found = f"reach {worst:g}, beyond {limit:g}" if math.isfinite(worst) else f"are not finite ({worst})"
    raise NotFiniteError(f"{what} {found}; {way_out}")
