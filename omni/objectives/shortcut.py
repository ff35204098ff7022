"""Shortcut models (arXiv 2410.12557): one jump of length d equals two of length d / 2.

b1 = F(x_t, t, m),  x' = x_t + (m - t) b1,  b2 = F(x', m, s),  m = (t + s) / 2       of the target network
target = clip((b1 + b2) / 2)   for the keyed share `bootstrap` of the items, whose d = t - s is 1, 1/2, ..., 2/M
target = v, at s = t           for the others (flow matching)

The paper's network takes log2(1/d), and the finest step 1/M represents the instantaneous velocity. Here that velocity
is the diagonal, so the two halves of the finest jump, 2/M, are Euler steps along F(x, t, t). Only that level is guided
(with the target network's own null velocity); coarser levels inherit it. The paper has no guidance embedding. With
`embed_guidance`, jumps have the guidance embedding of beta = 1 / w and the velocity keeps beta = 1. One network then
has both fields, and a guided jump is one evaluation (guided distillation, arXiv 2210.03142, in one training). Every
item passes through every evaluation: flow-matching items do not save the two of the target.

Legend: I items.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Items, Terms, squared_error
from omni.objectives.target_guidance import embed_scale, guide
from omni.objectives.times import TimeDistribution, uniform_I
from omni.rng import Key


@OBJECTIVES.register("shortcut")
class Shortcut(FlowObjective):
    """time: of the flow-matching items, and of both ends if not `dyadic` (then jumps have any length).

    num_levels: log2 M. shares: the probability of each level, the longest jump first; None: equal. bootstrap: share of
    items that bootstrap. clip: bound of x' and of the target, for latents of unit scale; None: none.
    guidance_scale: w of the finest level, 1 is none (the paper: 1.5). embed_guidance: see above. target_decay: of the
    average behind the target. The paper also needs weight decay 0.1 for stability; that is the optimiser's.
    """

    trains = ("grid_jumps", "velocity")
    time: TimeDistribution = TimeDistribution(kind="uniform")
    num_levels: int = Field(default=7, ge=1, le=20)
    shares: tuple[float, ...] | None = None
    bootstrap: float = Field(default=0.125, ge=0, le=1)
    dyadic: bool = True
    clip: float | None = Field(default=4.0, gt=0)
    guidance_scale: float = Field(default=1.0, ge=1)
    embed_guidance: bool = False
    target_decay: float | None = Field(default=0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Shortcut:
        if self.shares is not None:
            if len(self.shares) != self.num_levels or min(self.shares) < 0 or sum(self.shares) == 0:
                raise ValueError(f"shares must be {self.num_levels} weights, one per level, got {list(self.shares)}")
            if not self.dyadic:
                raise ValueError("shares has no effect with dyadic=false, whose jumps have any length; leave it out")
        if self.embed_guidance and self.guidance_scale == 1:
            raise ValueError("embed_guidance has no effect at guidance_scale 1; raise it, or leave embed_guidance out")
        return self

    @property
    def needs_null(self) -> bool:
        return self.guidance_scale > 1

    @property
    def finest(self) -> float:
        """2/M, the shortest jump that is bootstrapped."""
        return 2.0 ** (1 - self.num_levels)

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64: a keyed jump for the share `bootstrap`, else s = t."""
        t = self.time.draw(items.names, key)
        if self.dyadic:
            # M = 2^L; d = 2^-k with k in 0..L-1, t uniform on the multiples of d
            d = 0.5 ** self._level(uniform_I(items.names, key, "level"))
            start = d * (1 + (uniform_I(items.names, key, "start") / d).floor())
            end = start - d
        else:
            other = self.time.draw(items.names, key, "end time")
            start, end = torch.maximum(t, other), torch.minimum(t, other)
        jumps = uniform_I(items.names, key, "bootstrap") < self.bootstrap
        return torch.where(jumps, start, t), torch.where(jumps, end, t)

    def _level(self, u_I: Tensor) -> Tensor:
        """(I,) float64: k, from uniform numbers."""
        if self.shares is None:
            return (u_I * self.num_levels).floor()
        edges = torch.tensor(self.shares, dtype=torch.float64, device=u_I.device).cumsum(0)
        return torch.searchsorted(edges[:-1] / edges[-1], u_I, right=True).double()

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        target = draw.v
        if self.bootstrap > 0:
            jumps = draw.items.expand(draw.t - draw.s) > 0
            with torch.no_grad():
                target = torch.where(jumps, self._two_halves(call.target(), draw).to(target.dtype), target)
        embedded = self._embedded(call, draw.items, draw.t > draw.s)
        return squared_error(embedded(draw.x, draw.t, draw.s), target, draw.items, self.weight)

    def _embedded(self, call: FlowCall, items: Items, where_I: Tensor) -> FlowCall:
        """The call with the guidance embedding of the scale at items of `where`, if `embed_guidance`."""
        return embed_scale(call, items, self.guidance_scale, where_I) if self.embed_guidance else call

    def _two_halves(self, network: FlowCall, draw: Draw) -> Tensor:
        """The target of a jump: the mean velocity of its two halves, of the target network."""
        t, s, items = draw.t, draw.s, draw.items
        m = (t + s) / 2
        finest = (t - s) < 1.5 * self.finest
        first = self._velocity(network, draw.x, t, torch.where(finest, t, m), finest, items)
        x = self._clip(draw.x + items.expand(m - t) * first)
        second = self._velocity(network, x, m, torch.where(finest, m, s), finest, items)
        return self._clip((first + second) / 2)

    def _clip(self, x: Tensor) -> Tensor:
        """x within [-clip, clip]."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _velocity(self, network: FlowCall, x: Tensor, t: Tensor, s: Tensor, finest: Tensor, items: Items) -> Tensor:
        """F (R, S, C), guided at the finest level for items with their condition."""
        x = x.to(items.latents.dtype)
        own = self._embedded(network, items, ~finest)(x, t, s)
        w = self.guidance_scale
        return own if w == 1 else guide(own, network, x, t, s, w, items, finest)
