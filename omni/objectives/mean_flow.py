"""MeanFlow (arXiv 2505.13447, eq. 10): F(x_t, t, s) is the average velocity between t and s.

target = v - (t - s) d/dt F(x_t, t, s)      (total derivative along (v, 1, 0), stop-gradient)
loss   = e / sg(e + c)^p,  e = mean square over the block
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Items, Terms
from omni.rng import Key


@OBJECTIVES.register("mean_flow")
class MeanFlow(FlowObjective):
    """`diagonal`: share of items trained at s = t. `power`, `offset`: the adaptive weight's p and c (0: plain L2)."""

    diagonal: float = 0.5
    power: float = 1.0
    offset: float = 1e-3

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(max, min) of two independent draws; a keyed share has s = t."""
        a, b = self.time.draw(items, key, "time"), self.time.draw(items, key, "end time")
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        keep = torch.tensor(
            [key.fold("diagonal", *n).python().random() < self.diagonal for n in items.names], dtype=torch.bool
        )
        return t, torch.where(keep.to(t.device), t, s)

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        one, zero = torch.ones_like(draw.t), torch.zeros_like(draw.s)
        rate = call.derivative(draw.x, draw.t, draw.s, draw.v, one, zero)
        target = (draw.v - draw.items.expand(draw.t - draw.s) * rate).detach()
        error = (call(draw.x, draw.t, draw.s).float() - target.float()).pow(2).mean(-1) * draw.items.mask
        index = draw.items.item.clamp(min=0).flatten()
        ones = draw.items.mask.flatten().float()
        num = len(draw.items.names)
        sums = torch.zeros(num, device=error.device).index_add(0, index, error.flatten())
        counts = torch.zeros(num, device=error.device).index_add(0, index, ones).clamp(min=1)
        mean = sums / counts
        weighted = mean / (mean.detach() + self.offset).pow(self.power)
        return Terms((weighted * counts).sum(), float(ones.sum()), self.weight)
