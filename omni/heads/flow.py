"""The flow-map head: average velocity F(x, t, s, context) of a block of latents.

House convention: t = 1 is noise, t = 0 data, s <= t is where the jump ends; the jump is x + (s - t) F. The head embeds
noisy latents and the condition (t, t - s, guidance) and reads F; the transformer between the two is not its business.
Time inputs are sinusoids with angular frequencies up to `max_frequency` (kept low so that derivatives in t and s stay
tame: flow maps are trained through them), then an MLP each, summed.

Legend: R rows, S positions, C channels, W width, I items (copies).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from omni.config import Frozen
from omni.nn.transformer import spread


class FlowHeadConfig(Frozen):
    """channels: latents' channels. time_scale multiplies both times; max_frequency is in radians per unit of time."""

    channels: int = 64
    time_scale: float = 1.0
    max_frequency: float = 16.0
    num_frequencies: int = 32


class ScalarEmbedding(nn.Module):
    """(I,) -> (I, W): sinusoids, then a two-layer MLP."""

    def __init__(self, width: int, c: FlowHeadConfig) -> None:
        super().__init__()
        octaves = torch.linspace(math.log(0.25), math.log(c.max_frequency), c.num_frequencies)
        self.register_buffer("frequency", octaves.exp() * c.time_scale, persistent=False)
        self.up = nn.Linear(2 * c.num_frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, value_I: Tensor) -> Tensor:
        frequency: Tensor = self.frequency  # type: ignore[assignment]
        angle = value_I[:, None] * frequency.to(value_I.dtype)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.up.weight.dtype)
        return self.down(torch.nn.functional.silu(self.up(features)))


class FlowHead(nn.Module):
    """Embeds clean latents for the context stream and noisy ones for the refine stream; reads velocities."""

    def __init__(self, width: int, c: FlowHeadConfig) -> None:
        super().__init__()
        self.c = c
        self.clean = nn.Linear(c.channels, width)
        self.noisy = nn.Linear(c.channels, width)
        self.time = ScalarEmbedding(width, c)
        self.gap = ScalarEmbedding(width, c)
        self.guidance = ScalarEmbedding(width, c)
        self.modulation = nn.Linear(width, 2 * width)
        self.velocity = nn.Linear(width, c.channels)

    def embed_clean(self, latents_RNC: Tensor) -> Tensor:
        """Finished latents, for the context stream: (R, N, C) -> (R, N, W)."""
        return self.clean(latents_RNC)

    def embed(self, x_RSC: Tensor) -> Tensor:
        """Noisy latents, for the refine stream: (R, S, C) -> (R, S, W)."""
        return self.noisy(x_RSC)

    def condition(self, t_I: Tensor, s_I: Tensor, guidance_I: Tensor) -> Tensor:
        """(I, W) from the start and end times and the guidance input beta = 1 / w (1 is no guidance)."""
        return self.time(t_I) + self.gap(t_I - s_I) + self.guidance(guidance_I)

    def read(self, hidden_RSW: Tensor, condition_IW: Tensor, item: Tensor | None) -> Tensor:
        """Velocity (R, S, C); `item` (R, S) says which condition a position has (None: each row has its own)."""
        vectors = self.modulation(torch.nn.functional.silu(condition_IW))
        scale, shift = spread(vectors.to(hidden_RSW.dtype), item).chunk(2, -1)
        return self.velocity(hidden_RSW * (1 + scale) + shift)
