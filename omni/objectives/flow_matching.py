"""Flow matching (arXiv 2210.02747): regress the instantaneous velocity, F(x_t, t, t) = E[eps - x0 | x_t]."""

from __future__ import annotations

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Terms, squared_error


@OBJECTIVES.register("flow_matching")
class FlowMatching(FlowObjective):
    """E |F(x_t, t, t) - v|^2 over t of `time`."""

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        return squared_error(call(draw.x, draw.t, draw.t), draw.v, draw.items, self.weight)
