"""Progressive distillation (arXiv 2202.00512), guided (arXiv 2210.03142), in one training, along its own path.

From the item's noise the target network integrates to the data in `fine` equal steps, guided by w, and long jumps learn
the result: with x_i the states of that path and k = fine / n,

    F(x_i, t_i, t_{i+k}) = (x_i - x_{i+k}) / (t_i - t_{i+k})     for every n in `jumps` and each of its n jumps
    F(x_t, t, t) = v                                             flow matching, `velocity_weight` times

The loss is a mean over jumps; those of length 1/n have weight n, since the error of longer jumps is larger and would
dominate. The paper halves the number of steps repeatedly, with a new teacher each time; here the teacher is the average
of the present weights, and all lengths are trained at once. Unlike a shortcut, whose x_t is between data and noise, a
jump is trained at the sampler's own states; in the emoji world this decided whether it improved at all.

Jumps have the guidance embedding of beta = 1 / w; the path and the velocity have beta = 1, so one network has both
fields. Without the velocity term nothing depends on data, and jumps learn from the initial network only.

Legend: I items.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Terms, channel_error
from omni.objectives.target_guidance import embed_scale, guide


@OBJECTIVES.register("progressive_distillation")
class ProgressiveDistillation(FlowObjective):
    """time: of the flow-matching term. fine: steps of the path. walk: by jumps F(x, t, s), or Euler steps along the
    velocity F(x, t, t). jumps: how many jumps from noise to data, each a divisor of `fine`. guidance_scale: w, 1 is
    none.
    target_decay: of the averaged weights of the path. A training step costs fine (with guidance twice) evaluations
    without a gradient, and sum(jumps) + 1 with one."""

    trains = ("grid_jumps", "velocity")
    fine: int = Field(default=8, ge=2)
    walk: Literal["jump", "velocity"] = "jump"
    jumps: tuple[int, ...] = (4, 2, 1)
    guidance_scale: float = Field(default=1.0, ge=1)
    velocity_weight: float = Field(default=1.0, ge=0)
    target_decay: float | None = Field(default=0.999, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> ProgressiveDistillation:
        if not self.jumps or any(n < 1 or n >= self.fine or self.fine % n for n in self.jumps):
            raise ValueError(f"jumps must be divisors of fine = {self.fine} below it, got {list(self.jumps)}")
        return self

    @property
    def needs_null(self) -> bool:
        return self.guidance_scale > 1

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        items, w, path = draw.items, self.guidance_scale, self._path(call.target(), draw)
        embedded, errors = call if w == 1 else embed_scale(call, items, w), []
        for n in self.jumps:
            for k in range(n):
                x, end = (path[(k + ahead) * self.fine // n] for ahead in (0, 1))
                found = embedded(x.to(items.latents.dtype), *self._times(draw, k, n))
                errors.append(n * channel_error(found, (x - end) * n))
        error = torch.stack(errors).sum(0) / sum(n * n for n in self.jumps)
        if self.velocity_weight:
            error = error + self.velocity_weight * channel_error(call(draw.x, draw.t, draw.t), draw.v)
        return Terms((error * items.mask).sum(), float(items.mask.sum()), self.weight)

    @torch.no_grad()
    def _path(self, network: FlowCall, draw: Draw) -> list[Tensor]:
        """The states (R, S, C) at t = 1, 1 - 1/fine, ..., 0, in float32 or better."""
        items, w = draw.items, self.guidance_scale
        path = [draw.noise.to(torch.promote_types(draw.noise.dtype, torch.float32))]
        for k in range(self.fine):
            t, s = self._times(draw, k, self.fine)
            x, end = path[-1].to(items.latents.dtype), s if self.walk == "jump" else t
            F = network(x, t, end)
            if w > 1:
                F = guide(F, network, x, t, end, w, items)
            path.append(path[-1] - F.to(path[-1].dtype) / self.fine)
        return path

    def _times(self, draw: Draw, k: int, n: int) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,), of the k-th of n equal jumps."""
        return torch.full_like(draw.t, 1 - k / n), torch.full_like(draw.t, 1 - (k + 1) / n)
