"""Continuous-time consistency training, sCM's sCT (arXiv 2410.11081), in Omni's coordinates.

sCM's path is x_tau = cos(tau) x0 + sin(tau) eps. With tan tau = t / (1 - t) and n = sqrt((1 - t)^2 + t^2) it is
x_tau = x_t / n, dt / dtau = n^2, and sCM's network is (1 - 2t) / n x_t + n F(x_t, t, 0). Its tangent
cos(tau) df/dtau, f = x_t - t F, split as in sCM, is

    g = (1 - t)^2 / n (v - F) + r t (1 - t) ((2t - 1) / n (v - F) - n dF/dt)      d/dt along (v, 1, 0); r: 0 -> 1
    g <- g / (|g| + c)                                                           over all of a block's latents
    loss = |n (F - sg F) - sg g|^2 / D

At r = 1 and without the normalisation g = (1 - t) n (v - F - t dF/dt): MeanFlow's residual at s = 0, times a weight.
The derivative is taken along (k v, k, 0) with k = t (1 - t) n, as in sCM, so that nothing overflows near noise. sCM's
prior weight 1 / tan(tau) is already in g. Its learned weight exp(w(tau)) is omitted, since an objective has no
parameters; power = 1 divides by each item's own error instead. The target uses the present weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, Terms, channel_error
from omni.objectives.target_guidance import GuidedDraw, GuidedObjective
from omni.objectives.times import PairDistribution, TimeDistribution
from omni.objectives.weighting import adaptive, trigonometric_scale
from omni.rng import Key


@OBJECTIVES.register("continuous_consistency")
class ContinuousConsistency(GuidedObjective):
    """time: log(sigma) ~ N(-0.8, 1.6) of data of deviation 0.5 (ImageNet-512; ImageNet-64: -1, 1.6; CIFAR: -1, 1.4).

    normalise: |g| is the paper's "norm"; or "rms", the root mean square, with gradients that do not shrink for larger
    blocks (Omni's default: the network is shared with text); or "none". offset: c. warmup: r rises from 0 to 1 over
    this share of training (the paper: 10,000 steps). power, power_offset: of the adaptive weight.
    """

    trains = ("data_jumps",)
    time: TimeDistribution = TimeDistribution(kind="log_normal", mean=-0.8, std=1.6, shift=2.0)
    normalise: Literal["norm", "rms", "none"] = "rms"
    offset: float = Field(default=0.1, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    power: float = Field(default=0.0, ge=0)
    power_offset: float = Field(default=1e-3, gt=0)

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, 0), each (I,) float64."""
        return PairDistribution(kind="zero", time=self.time).draw(items.names, key)

    def loss(self, call: FlowCall, draw: GuidedDraw) -> Terms:
        call, v = self.guidance.apply(call, draw)
        items = draw.items
        flow = call(draw.x, draw.t, draw.s)
        tangent = self.tangent(call, draw, v, flow.detach())
        g = self._normalised(tangent, items)
        n = items.expand(trigonometric_scale(draw.t))
        error = items.mean(channel_error(n * (flow - flow.detach()), g))
        raw = items.mean(tangent.pow(2).mean(-1))
        return items.terms(adaptive(error, self.power, self.power_offset), self.weight, raw)

    def tangent(self, call: FlowCall, draw: GuidedDraw, v: Tensor, flow: Tensor) -> Tensor:
        """g (R, S, C) before it is normalised, in float32 or better."""
        t, items = draw.t, draw.items
        n = trigonometric_scale(t)
        k = t * (1 - t) * n
        rate = call.derivative(draw.x, t, draw.s, items.expand(k) * v, k, torch.zeros_like(t))
        r = min(1.0, items.progress / self.warmup) if self.warmup else 1.0
        ahead = (1 - t) ** 2 / n + r * t * (1 - t) * (2 * t - 1) / n
        dtype = torch.promote_types(v.dtype, torch.float32)
        return items.expand(ahead).to(dtype) * (v.to(dtype) - flow.to(dtype)) - r * rate.to(dtype)

    def _normalised(self, g: Tensor, items: Items) -> Tensor:
        """g (R, S, C) over |g| + c of its item, by `normalise`."""
        if self.normalise == "none":
            return g
        square = items.mean(g.pow(2).mean(-1))
        if self.normalise == "norm":
            square = square * items.counts.to(square.dtype) * g.shape[-1]
        return g / (items.expand(square.sqrt()).to(g.dtype) + self.offset)
