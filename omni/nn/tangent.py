"""Forward-mode derivatives for stop-gradient targets ("two-pass": tangent without a graph, then an ordinary forward).

Only the refine stream is differentiated: the context's keys and values enter as constants, and two copies never see one
another, so there is no tangent between copies (a cross-copy tangent makes MeanFlow silently wrong).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def directional(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """d/dh function(primals + h tangents) at h = 0; the result has no graph. Same shape as the function's value."""
    with torch.no_grad():
        return torch.func.jvp(function, primals, tangents)[1].detach()
