"""The flow-map head: average velocity F(x, t, s, context) of a block of latents.

House convention: t = 1 is noise, t = 0 data, s <= t is where the jump ends; the jump is x + (s - t) F. The head embeds
noisy latents and the condition (t, t - s, guidance) and reads F; the transformer between the two is not its business.
Time inputs are sinusoids with angular frequencies up to `max_frequency` (kept low so that derivatives in t and s stay
tame: flow maps are trained through them), then an MLP each, summed.

F is affine in what the network reads out, G; so every parametrisation has the same jump, and no objective or sampler
knows which one it is. With n^2 = (1 - t)^2 + t^2, data and noise of deviation 1:

    velocity      F = G                             jump x - (t - s) G         (flow matching, MeanFlow, TVM)
    simple_edm    F = ((2 t - 1) / n^2) x + G / n   jump c_skip x + c_out G    (IMM, arXiv 2503.07565; see below)
    x             F = (x - G) / t                   jump (s / t) x + (1 - s / t) G, G is the data

    c_skip = ((1 - t)(1 - s) + t s) / n^2           c_out = -((1 - s) t - (1 - t) s) / n

The denoiser of EDM and CTM (arXiv 2206.00364, 2310.02279) is simple_edm with -G. In simple_edm G has deviation of about
1 at every t.

Legend: R rows, S positions, C channels, W width, I items (copies).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.nn.transformer import spread

Parametrisation = Literal["velocity", "simple_edm", "x"]


class FlowHeadConfig(Frozen):
    """What fixes the flow head.

    channels: latents' channels.
    time_scale: multiplies t and t - s before they are embedded. 1 for what is trained through derivatives in time
        (they are multiplied too), 1000 as IMM has it, which tells nearly equal times apart.
    max_frequency: of the embedding, in radians per unit of (scaled) time.
    parametrisation: what the network reads out, see the head of this file.
    scale_input: x is divided by n before it is embedded (EDM's c_in), so that its deviation is 1 at every t.
    whole: the condition also has what an item is as a whole, the mean of its noisy latents. A choice that concerns all
        of a picture then need not be agreed on between its positions (see omni.coupling).
    min_time: of "x" alone: below it F = (x - G) / min_time, finite at t = 0. The jump to s = t is still x and G still
        has a right value, x - min_time F, but is no longer the data. JiT's (arXiv 2511.13720).
    """

    channels: int = 64
    time_scale: float = Field(default=1.0, gt=0)
    max_frequency: float = 16.0
    num_frequencies: int = 32
    parametrisation: Parametrisation = "velocity"
    scale_input: bool = False
    whole: bool = False
    min_time: float = Field(default=0.05, gt=0, le=1)


class ScalarEmbedding(nn.Module):
    """(I,) -> (I, W): sinusoids of `scale` times the value, then a two-layer MLP."""

    def __init__(self, width: int, c: FlowHeadConfig, scale: float) -> None:
        super().__init__()
        self.c, self.scale = c, scale
        self.up = nn.Linear(2 * c.num_frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, value_I: Tensor) -> Tensor:
        # Not kept as a buffer: model.to(bfloat16) would round it, which at time_scale 1000 is 30 radians.
        lowest, highest = math.log(0.25), math.log(self.c.max_frequency)
        octaves = torch.linspace(lowest, highest, self.c.num_frequencies, device=value_I.device, dtype=torch.float32)
        angle = value_I[:, None] * (octaves.exp() * self.scale).to(value_I.dtype)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.up.weight.dtype)
        return self.down(torch.nn.functional.silu(self.up(features)))


class WholeEmbedding(nn.Module):
    """(R, S, C) -> (I, W): the mean of an item's latents times the root of their number, which of noise has deviation 1
    whatever the size of the item; then a two-layer MLP."""

    def __init__(self, width: int, c: FlowHeadConfig) -> None:
        super().__init__()
        self.up = nn.Linear(c.channels, width)
        self.down = nn.Linear(width, width)

    def forward(self, x_RSC: Tensor, item: Tensor | None, num_items: int) -> Tensor:
        whole_IC = pooled(x_RSC, item, num_items).to(self.up.weight.dtype)
        return self.down(torch.nn.functional.silu(self.up(whole_IC)))


def pooled(x_RSC: Tensor, item: Tensor | None, num_items: int) -> Tensor:
    """(I, C), float32 or better: the sum over an item's positions over the root of their number; padding ignored."""
    x = x_RSC.to(torch.promote_types(x_RSC.dtype, torch.float32))
    if item is None:
        return x.sum(1) / x.shape[1] ** 0.5
    index = torch.where(item >= 0, item, num_items).flatten()
    total = x.new_zeros(num_items + 1, x.shape[-1]).index_add(0, index, x.flatten(0, 1))
    count = x.new_zeros(num_items + 1).index_add(0, index, x.new_ones(len(index)))
    return (total / count.clamp(min=1).sqrt().unsqueeze(-1))[:num_items]


class FlowHead(nn.Module):
    """Embeds clean latents for the context stream and noisy ones for the refine stream; reads velocities."""

    def __init__(self, width: int, c: FlowHeadConfig) -> None:
        super().__init__()
        self.c = c
        self.clean = nn.Linear(c.channels, width)
        self.noisy = nn.Linear(c.channels, width)
        self.time = ScalarEmbedding(width, c, c.time_scale)
        self.gap = ScalarEmbedding(width, c, c.time_scale)
        self.guidance = ScalarEmbedding(width, c, 1.0)
        self.whole = WholeEmbedding(width, c) if c.whole else None
        self.modulation = nn.Linear(width, 2 * width)
        self.velocity = nn.Linear(width, c.channels)

    def embed_clean(self, latents_RNC: Tensor) -> Tensor:
        """Finished latents, for the context stream: (R, N, C) -> (R, N, W)."""
        return self.clean(latents_RNC)

    def embed(self, x_RSC: Tensor, t_I: Tensor, item: Tensor | None) -> Tensor:
        """Noisy latents at t, for the refine stream: (R, S, C) -> (R, S, W). `item` as in `read`."""
        if self.c.scale_input:
            x_RSC = (x_RSC / _deviation(_at(t_I, item))).to(x_RSC.dtype)
        return self.noisy(x_RSC)

    def condition(self, t_I: Tensor, s_I: Tensor, guidance_I: Tensor, x_RSC: Tensor, item: Tensor | None) -> Tensor:
        """(I, W) from the start and end times, the guidance input beta = 1 / w (1 is no guidance), and, with `whole`,
        the noisy latents; `item` as in `read`."""
        condition = self.time(t_I) + self.gap(t_I - s_I) + self.guidance(guidance_I)
        return condition if self.whole is None else condition + self.whole(x_RSC, item, len(t_I))

    def read(self, hidden_RSW: Tensor, condition_IW: Tensor, item: Tensor | None, x_RSC: Tensor, t_I: Tensor) -> Tensor:
        """F (R, S, C) of x at t; `item` (R, S) says which condition and time a position has (None: each row its own).

        Of another parametrisation than velocity in x's dtype, computed in t's (float32 or better).
        """
        vectors = self.modulation(torch.nn.functional.silu(condition_IW))
        scale, shift = spread(vectors.to(hidden_RSW.dtype), item).chunk(2, -1)
        output = self.velocity(hidden_RSW * (1 + scale) + shift)
        if self.c.parametrisation == "velocity":
            return output
        return average_velocity(output, x_RSC, _at(t_I, item), self.c.parametrisation, self.c.min_time).to(x_RSC.dtype)


def average_velocity(
    output: Tensor, x: Tensor, t: Tensor, parametrisation: Parametrisation, min_time: float = 0.05
) -> Tensor:
    """F from the network's output G at (x, t): all broadcast; see the head of this file. The same for every s."""
    if parametrisation == "velocity":
        return output
    if parametrisation == "x":
        return (x - output) / t.clamp(min=min_time)
    n = _deviation(t)
    return (2 * t - 1) / n**2 * x + output / n


def _deviation(t: Tensor) -> Tensor:
    """n: the deviation of x_t when data and noise have deviation 1."""
    return ((1 - t) ** 2 + t**2).sqrt()


def _at(t_I: Tensor, item: Tensor | None) -> Tensor:
    """(I,) -> (R, S, 1), or (R, 1, 1) where `item` is None. Never in half precision."""
    return spread(t_I.unsqueeze(-1), item)
