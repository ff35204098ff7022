"""Improved MeanFlow (arXiv 2512.02012): MeanFlow as a regression of the velocity, by a network whose input is x_t
alone.

V    = F(x_t, t, s) + (t - s) sg(d/dt F(x_t, t, s))     total derivative along (u, 1, 0), u = sg F(x_t, t, t)
loss = adp |V - v_g|^2 + a adp |F(x_t, t, t) - v_g|^2   adp(e) = e / sg(e + c)^p

The tangent u is the network's own velocity, not the sample's v, so the target does not have that noise. In the paper u
is from a second head on shared layers; here it is the diagonal of F, the optimum of that head, and the second term
trains it on every item. The paper's network takes t - s, guidance and its interval as tokens, not t: that is
architecture, not objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, Terms, channel_error
from omni.objectives.target_guidance import GuidedDraw, GuidedObjective, TargetGuidance
from omni.objectives.times import PairDistribution, TimeDistribution
from omni.objectives.weighting import adaptive
from omni.rng import Key


@OBJECTIVES.register("improved_mean_flow")
class ImprovedMeanFlow(GuidedObjective):
    """Times as in MeanFlow; `diagonal`: share of items at s = t. velocity_weight: a above.

    power, offset: the adaptive weight's p and c (of the mean square). guidance: off by default; the paper samples
    w ~ w^-power on [1, 8] with mix "inverse", the default of `mix` here: guidance = {max_scale = 8}.
    """

    trains = ("jumps", "velocity")
    moves_together = "any"
    time: TimeDistribution = TimeDistribution(mean=-0.4)
    end: TimeDistribution | None = None
    diagonal: float = Field(default=0.5, ge=0, le=1)
    velocity_weight: float = Field(default=1.0, ge=0)
    power: float = Field(default=1.0, ge=0)
    offset: float = Field(default=0.01, gt=0)
    guidance: TargetGuidance = TargetGuidance(mix="inverse")

    @field_validator("guidance", mode="before")
    @classmethod
    def _mix_of_the_paper(cls, value: Any) -> Any:
        """A table of guidance without `mix` has the paper's."""
        return {"mix": "inverse", **value} if isinstance(value, Mapping) else value

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64, as in MeanFlow."""
        return PairDistribution(time=self.time, end=self.end, diagonal=self.diagonal).draw(items.names, key)

    def loss(self, call: FlowCall, draw: GuidedDraw) -> Terms:
        call, v = self.guidance.apply(call, draw)
        items, velocity = draw.items, call(draw.x, draw.t, draw.t)
        turn = self.turn(call, draw, velocity.detach().to(draw.x.dtype)).detach()
        compound = call(draw.x, draw.t, draw.s) + turn
        errors = [items.mean(channel_error(found, v)) for found in (compound, velocity)]
        loss, diagonal = (adaptive(error, self.power, self.offset) for error in errors)
        raw = errors[0] + self.velocity_weight * errors[1]
        return items.terms(loss + self.velocity_weight * diagonal, self.weight, raw)
