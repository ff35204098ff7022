"""Schedules of the learning rate: a rise times a fall, both pure functions of where the run is.

    rate * rise(step, warmup_steps) * fall(step / num_steps, "cosine")

Nothing here has state, so a resumed run needs none.
"""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["linear", "cosine", "wsd", "none"]


def rise(step: int, warmup_steps: int) -> float:
    """Linear warm-up: 1 / warmup_steps at step 0, 1 from step warmup_steps - 1 on. 1 without a warm-up."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def rise_over(fraction: float, share: float, start: float = 1e-3) -> float:
    """Linear warm-up over a share of the run, of which `fraction` is behind us. It begins at start / share."""
    return min(1.0, (fraction + start) / share) if share else 1.0


def fall(fraction: float, decay: Decay, min_factor: float = 0.0, decay_fraction: float = 0.25) -> float:
    """From 1 to `min_factor` over the run. A fraction outside [0, 1] counts as the nearer end.

    decay_fraction: share of the run that "wsd" (warm-up, stable, decay) spends falling.
    """
    fraction = min(max(fraction, 0.0), 1.0)
    match decay:
        case "linear":
            factor = 1.0 - fraction
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * fraction))
        case "wsd":
            factor = min(1.0, (1.0 - fraction) / decay_fraction)
        case _:
            factor = 1.0
    return min_factor + (1.0 - min_factor) * factor
