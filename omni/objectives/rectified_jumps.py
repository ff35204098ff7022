"""Rectified jumps: every jump along the line from noise to its data, trained at once.

    F(x_t, t, s) = eps - x0        for the jumps of 1, 2, ... equal steps from noise to data

This is the average velocity of the flow where lines do not cross; one step is then as accurate as N. Lines of
independently paired noise and data cross: a single jump learns the mean of all data. Use pairs whose lines do not cross
(rectified flow, arXiv 2209.03003) or cross less often (pairing = "transport"). Between the two, jumps are Euler steps
of flow matching on the same pairs, accurate for large N.

A jump may predict the likeliest of several ends instead of their mean, by a loss that levels off for large errors,
e / (e + offset)^power of an item's mean square (MeanFlow's adaptive weight, arXiv 2505.13447). For a noise that leads
to one of two ends with odds of 2 to 1, its optimum is near the likelier end; the optimum of the square is a third of
the way to the other. Of independent pairs the likeliest end is not a sample.

One evaluation an item: with probability `velocity` an item trains F(x_t, t, t) instead, at a time of `time`. Jumps have
the guidance embedding of 1 / w, as guided jumps do, so one network has both fields. A velocity is a mean: its loss is
always the square.

Legend: I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Items, Terms, channel_error
from omni.objectives.times import uniform_I
from omni.objectives.weighting import adaptive
from omni.rng import Key


@dataclass(frozen=True)
class JumpDraw(Draw):
    """`beta` (I,): the guidance embedding's input, for each item's jump."""

    beta: Tensor


@OBJECTIVES.register("rectified_jumps")
class RectifiedJumps(FlowObjective):
    """jumps: how many equal jumps from noise to data, with probabilities `shares` (equal if empty); an item trains one
    of the n jumps. velocity: share of items that train F(x_t, t, t). guidance_embedding: its w, 1 is
    none.

    power, offset: of the jumps' weight (offset / (e + offset))^power; power 0 is the square.
    """

    trains = ("grid_jumps", "velocity")
    jumps: tuple[int, ...] = (1, 2, 4, 8)
    shares: tuple[float, ...] = ()
    velocity: float = Field(default=0.25, ge=0, le=1)
    guidance_embedding: float = Field(default=1.0, ge=1)
    power: float = Field(default=0.0, ge=0)
    offset: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _check(self) -> RectifiedJumps:
        if not self.jumps or min(self.jumps) < 1:
            raise ValueError(f"jumps must be one or more counts of at least 1, got {list(self.jumps)}")
        if self.shares and (len(self.shares) != len(self.jumps) or min(self.shares) < 0 or not sum(self.shares)):
            raise ValueError(f"shares must be one for each of the {len(self.jumps)} jumps, got {list(self.shares)}")
        return self

    def draw(self, items: Items, key: Key) -> JumpDraw:
        shares = torch.tensor(self.shares or [1.0] * len(self.jumps), dtype=torch.float64)
        which = torch.searchsorted((shares / shares.sum()).cumsum(0), uniform_I(items.names, key, "jumps"), right=True)
        count = torch.tensor(self.jumps, dtype=torch.float64)[which.clamp(max=len(self.jumps) - 1)]
        number = (uniform_I(items.names, key, "which jump") * count).floor()
        is_jump = uniform_I(items.names, key, "velocity") >= self.velocity
        at = self.time.draw(items.names, key)
        t, s = (torch.where(is_jump, 1 - (number + ahead) / count, at) for ahead in (0, 1))
        [beta] = items.times(torch.where(is_jump, 1 / self.guidance_embedding, 1.0).to(torch.float64))
        t, s = items.times(t, s)
        noise = items.noise(key)
        return JumpDraw(items.interpolate(noise, t), noise - items.latents, t, s, items, noise, beta)

    def loss(self, call: FlowCall, draw: JumpDraw) -> Terms:  # type: ignore[override]
        found = call.guided(draw.beta)(draw.x, draw.t, draw.s)
        error = draw.items.mean(channel_error(found, draw.v))
        near = adaptive(error, self.power, self.offset) * self.offset**self.power
        return draw.items.terms(torch.where(draw.t == draw.s, error, near), self.weight, error)
