"""The latent head: F(x_n, t, s | z_n) by a small MLP on the hidden state z_n of the transformer (MAR,
arXiv 2406.11838, whose head is a diffusion model; here it is any flow map).

The transformer reads which latents are known, and is evaluated once; the head is evaluated in every step. With it, the
latents that are drawn together are independent given z. Each block of the MLP is modulated by z_n and the condition.

Legend: R batch rows, S positions, C channels, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.nn.declare import FAN_IN, HIDDEN, ZERO, Declared, of_linear


class HeadBlock(nn.Module):
    """h + gate MLP(norm(h) (1 + scale) + shift); the modulation starts at zero, so the block starts as h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def declare(self) -> dict[str, Declared]:
        return (
            of_linear("modulation", self.modulation, ZERO)
            | of_linear("up", self.up, HIDDEN)
            | of_linear("down", self.down, HIDDEN)
        )

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h, condition (..., W) -> (..., W)."""
        scale, shift, gate = self.modulation(condition).chunk(3, -1)
        y = F.rms_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return h + gate * self.down(F.silu(self.up(y)))


class LatentHead(nn.Module):
    """`depth` blocks over a projection of the noisy latents. mask: the transformer's input for a latent that is not
    known, (W,)."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(width))
        self.enter = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))

    def declare(self) -> dict[str, Declared]:
        return {"mask": Declared("embedding", 0.02)} | of_linear("enter", self.enter, FAN_IN)

    def forward(self, z_RSW: Tensor, x_RSC: Tensor, condition_RSW: Tensor) -> Tensor:
        """Hidden states (R, S, W) from z, the noisy latents x (R, S, C), and the condition of each position."""
        h, condition = self.enter(x_RSC), F.silu(z_RSW + condition_RSW)
        for block in self.blocks:
            h = block(h, condition)
        return h
