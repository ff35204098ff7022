"""Rotary positions with three coordinates (time, row, column), in units of one text token or one latent cell.

Frequency i of the head belongs to the axis i mod 3, so each axis has high and low frequencies. A text token has three
equal coordinates, and then the table is exactly the ordinary 1-D rotary table of decoder language models
(RoFormer, arXiv 2104.09864; half-split convention of Llama).

Legend: R rows, N positions, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    position: Tensor, head_dim: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (R, 1, N, D), for `position` (R, N, 3). Angles are computed in float32 (float64 for float64)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    index = torch.arange(head_dim // 2, device=position.device)
    frequency = base ** (-index.to(work) * 2 / head_dim)
    angle = position.to(work)[..., index % 3] * frequency  # (R, N, D/2)
    angle = torch.cat([angle, angle], -1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (R, H, N, D) by a table of `rotary_table`."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
