"""MeanFlow (arXiv 2505.13447, eq. 10): F(x_t, t, s) is the average velocity between t and s.

target = v - (t - s) d/dt F(x_t, t, s)      (total derivative along (v, 1, 0), stop-gradient)
loss   = e / sg(e + c)^p,  e = mean square over the block

With guidance, v is the guided velocity of `target_guidance`, in the tangent as well as in the target.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, Terms, channel_error
from omni.objectives.target_guidance import GuidedDraw, GuidedObjective
from omni.objectives.times import PairDistribution, TimeDistribution
from omni.objectives.weighting import adaptive
from omni.rng import Key


@OBJECTIVES.register("mean_flow")
class MeanFlow(GuidedObjective):
    """Times are the larger and the smaller of two samples.

    time: their density; end: that of the second if it differs. The paper: mean -0.4, std 1 for both; CIFAR: (-2, 2) for
    both, later (-0.6, 1.6) and (-4, 1.6). diagonal: share of items trained at s = t: 0.5 by default; the paper: 0.75
    (ImageNet), 0.25 (CIFAR). power, offset: the adaptive weight's p and c, of the mean square: the paper's 1 and 1e-3
    (0.75 on CIFAR, c = 0.01 in the released ImageNet code); power 0 is plain L2.
    """

    trains = ("jumps", "velocity")
    moves_together = "all"
    time: TimeDistribution = TimeDistribution(mean=-0.4)
    end: TimeDistribution | None = None
    diagonal: float = Field(default=0.5, ge=0, le=1)
    power: float = Field(default=1.0, ge=0)
    offset: float = Field(default=1e-3, gt=0)

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64: the larger and the smaller of two samples."""
        return PairDistribution(time=self.time, end=self.end, diagonal=self.diagonal).draw(items.names, key)

    def loss(self, call: FlowCall, draw: GuidedDraw) -> Terms:
        call, v = self.guidance.apply(call, draw)
        items = draw.items
        target = (v - self.turn(call, draw, v)).detach()
        error = items.mean(channel_error(call(draw.x, draw.t, draw.s), target))
        return items.terms(adaptive(error, self.power, self.offset), self.weight, error)
