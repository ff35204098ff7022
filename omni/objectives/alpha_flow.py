"""alpha-Flow (arXiv 2510.20771): from trajectory flow matching (alpha = 1) to MeanFlow (alpha -> 0), by two forwards.

m = alpha s + (1 - alpha) t,  z = x_t - (t - m) v~
e = |F(x_t, t, s) - alpha v~ - (1 - alpha) sg F(z, m, s)|^2      loss = e / alpha * (alpha / sg(e + c))^p

v~ is the sample's v (or its guided one); with v~ = sg F(x_t, t, m) and alpha = 1/2 it is a shortcut model. If alpha is
clamped to 0, the loss is MeanFlow's, the limit of its gradient; at 1 there is one forward. s = 0 is discrete
consistency training. At s = t the gradient is flow matching's for every alpha.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, Terms, channel_error
from omni.objectives.target_guidance import GuidedDraw, GuidedObjective
from omni.objectives.times import PairDistribution, TimeDistribution
from omni.objectives.weighting import adaptive
from omni.rng import Key


@OBJECTIVES.register("alpha_flow")
class AlphaFlow(GuidedObjective):
    """alpha: fixed, or None for a sigmoid from 1 to 0 over [start, end] of training with slope `temperature`.

    clamp: alpha below it is 0, alpha above 1 - clamp is 1. velocity: v~ is the "data"'s or, for alpha < 1, the
    "network"'s. diagonal: share of items at s = t. power, offset: of the adaptive weight (of the mean square); power 0
    leaves e / alpha.
    """

    trains = ("jumps", "velocity")
    time: TimeDistribution = TimeDistribution(mean=-0.4)
    diagonal: float = Field(default=0.25, ge=0, le=1)
    alpha: float | None = Field(default=None, ge=0, le=1)
    temperature: float = Field(default=25.0, gt=0)
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    clamp: float = Field(default=5e-3, ge=0, lt=0.5)
    velocity: Literal["data", "network"] = "data"
    power: float = Field(default=1.0, ge=0)
    offset: float = Field(default=1e-3, gt=0)

    @model_validator(mode="after")
    def _check(self) -> AlphaFlow:
        if self.start >= self.end:
            raise ValueError(f"start must be below end, got start={self.start}, end={self.end}")
        return self

    def alpha_at(self, progress: float) -> float:
        """alpha after the share `progress` of training, clamped."""
        alpha = self.alpha
        if alpha is None:
            z = self.temperature * ((progress - self.start) / (self.end - self.start) - 0.5)
            alpha = 1 / (1 + math.exp(min(z, 700.0)))
        return 0.0 if alpha < self.clamp else 1.0 if alpha > 1 - self.clamp else alpha

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64: the larger and the smaller of two samples."""
        return PairDistribution(time=self.time, diagonal=self.diagonal).draw(items.names, key)

    def loss(self, call: FlowCall, draw: GuidedDraw) -> Terms:
        call, v = self.guidance.apply(call, draw)
        alpha = self.alpha_at(draw.items.progress)
        with torch.no_grad():
            target = self._mean_flow_target(call, draw, v) if alpha == 0 else self._target(call, draw, v, alpha)
        error = draw.items.mean(channel_error(call(draw.x, draw.t, draw.s), target))
        scale = alpha or 1.0
        return draw.items.terms(adaptive(error / scale, self.power, self.offset / scale), self.weight, error)

    def _target(self, call: FlowCall, draw: GuidedDraw, v: Tensor, alpha: float) -> Tensor:
        """The target of F at (x, t, s), for alpha above 0."""
        t, s, items = draw.t, draw.s, draw.items
        if alpha == 1:
            return v
        m = alpha * s + (1 - alpha) * t
        v = self._velocity(call, draw, v, m)
        z = draw.x - items.expand(t - m) * v
        return alpha * v + (1 - alpha) * call(z, m, s)

    def _mean_flow_target(self, call: FlowCall, draw: GuidedDraw, v: Tensor) -> Tensor:
        """The target of F at alpha = 0: MeanFlow's."""
        t, s, one, zero = draw.t, draw.s, torch.ones_like(draw.t), torch.zeros_like(draw.s)
        v = self._velocity(call, draw, v, t)
        return v - draw.items.expand(t - s) * call.derivative(draw.x, t, s, v, one, zero)

    def _velocity(self, call: FlowCall, draw: GuidedDraw, v: Tensor, m: Tensor) -> Tensor:
        """v~ (R, S, C). At s = t it is always the data's, which anchors the diagonal."""
        if self.velocity == "data":
            return v
        own = call(draw.x, draw.t, m).to(v.dtype)
        return torch.where(draw.items.expand(draw.t - draw.s) > 0, own, v)
