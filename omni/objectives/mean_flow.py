"""MeanFlow (arXiv 2505.13447, eq. 10): F(x_t, t, s) is the average velocity between t and s.

target = v - (t - s) d/dt F(x_t, t, s)      (total derivative along (v, 1, 0), stop-gradient)
loss   = e / sg(e + c)^p,  e = mean square over the block
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Items, Terms, channel_error
from omni.objectives.times import PairDistribution, TimeDistribution
from omni.objectives.weighting import adaptive
from omni.rng import Key


@OBJECTIVES.register("mean_flow")
class MeanFlow(FlowObjective):
    """`diagonal`: share of items trained at s = t. `power`, `offset`: the adaptive weight's p and c (0: plain L2)."""

    time: TimeDistribution = TimeDistribution(mean=-0.4)
    diagonal: float = 0.5
    power: float = 1.0
    offset: float = 1e-3

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        return PairDistribution(kind="max_min", time=self.time, diagonal=self.diagonal).draw(items.names, key)

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        items, one, zero = draw.items, torch.ones_like(draw.t), torch.zeros_like(draw.s)
        rate = call.derivative(draw.x, draw.t, draw.s, draw.v, one, zero)
        target = (draw.v - items.expand(draw.t - draw.s) * rate).detach()
        error = items.mean(channel_error(call(draw.x, draw.t, draw.s), target))
        return items.terms(adaptive(error, self.power, self.offset), self.weight)
