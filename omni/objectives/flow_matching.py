"""Flow matching (arXiv 2210.02747): regress the instantaneous velocity, F(x_t, t, t) = E[eps - x0 | x_t]."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Terms, channel_error, squared_error
from omni.objectives.weighting import fused_snr
from omni.sequence.block_context import Neighbours


@OBJECTIVES.register("flow_matching")
class FlowMatching(FlowObjective):
    """E |F(x_t, t, t) - v|^2 over t of `time`, or of `levels`.

    fused_snr: Diffusion Forcing's weights of the blocks of a level vector (objectives.weighting), with levels only;
    snr_decay: their decay. The reported raw loss has no weights.
    """

    moves_together = "any"
    fused_snr: bool = False
    snr_decay: float = Field(default=0.96, ge=0, lt=1)

    @model_validator(mode="after")
    def _weights_need_levels(self) -> Self:
        if self.fused_snr and self.levels is None:
            raise ValueError("fused_snr needs levels, the times of the blocks of a clip; give levels or leave it out")
        return self

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        found = call(draw.x, draw.t, draw.t)
        if not self.fused_snr:
            return squared_error(found, draw.v, draw.items, self.weight)
        blocks, t = Neighbours.of(draw.items.names), draw.t.cpu()
        weight = blocks.items(fused_snr(blocks.padded(t, fill=1.0), "velocity", self.snr_decay)).to(draw.t)
        error = draw.items.mean(channel_error(found, draw.v))
        return draw.items.terms(weight.to(error) * error, self.weight, error)
