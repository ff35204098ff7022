"""Consistency trajectory models (arXiv 2310.02279) from scratch: two-time jumps, compared after a second jump to 0.

estimate = f_sg(f(x_t, t, s), s, 0)               gradient through the inner jump alone
target   = sg f_sg(f_sg(x_u, u, s), s, 0)         s <= u < t
loss     = d(estimate, target) + a |F(x_t', t', t') - v|^2

f_sg is the target network. Without a teacher, x_u is the point on the same line through x0 and eps, where the paper
solves from x_t to u. The distance is in latents, not LPIPS; there is no adversarial loss. The second term is the
paper's denoising loss as flow matching, at its own times. In the paper its weight is the ratio of the two gradients on
the last layer, which an objective cannot access; here it is the number a.

Legend: I items; R batch rows, S positions, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from omni.objectives.base import (
    OBJECTIVES,
    Draw,
    FlowCall,
    FlowObjective,
    Items,
    Terms,
    channel_error,
    jump,
)
from omni.objectives.times import TimeDistribution, karras_times, uniform_I
from omni.objectives.weighting import Distance, distance
from omni.rng import Key


@dataclass(frozen=True)
class TrajectoryDraw(Draw):
    """`u` (I,), x_u (R, S, C): the start of the target; `velocity_t`: the time of the second term."""

    u: Tensor
    x_u: Tensor
    velocity_t: Tensor


@OBJECTIVES.register("consistency_trajectory")
class ConsistencyTrajectory(FlowObjective):
    """time: of the denoising term, log sigma ~ N(-1.2, 1.2). t, u, s are on EDM's grid of `num_nodes` nodes.

    t is a uniform node above 0, u is 1 to max_steps nodes below it (39; 17 on CIFAR), s is a uniform node up to u.
    velocity_weight: a. distance, huber_c: d, of the mean square. target_decay: of the target network's average.
    """

    trains = ("jumps", "velocity")
    time: TimeDistribution = TimeDistribution(kind="log_normal", mean=-1.2, std=1.2, shift=2.0)
    num_nodes: int = Field(default=40, ge=2)
    max_steps: int = Field(default=39, ge=1)
    rho: float = Field(default=7.0, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    data_std: float = Field(default=0.5, gt=0)
    distance: Distance = "l2"
    huber_c: float = Field(default=0.00054, gt=0)
    velocity_weight: float = Field(default=1.0, ge=0)
    target_decay: float | None = Field(default=0.999, ge=0, lt=1)

    def draw(self, items: Items, key: Key) -> TrajectoryDraw:
        grid = karras_times(self.num_nodes, self.rho, self.sigma_min, self.sigma_max, self.data_std)
        start, steps, end = (uniform_I(items.names, key, purpose) for purpose in ("start", "steps", "end"))
        i = 1 + (start * (self.num_nodes - 1)).long()
        j = i - 1 - (steps * i.clamp(max=self.max_steps)).long()
        k = (end * (j + 1)).long()
        t, u, s, velocity_t = items.times(grid[i], grid[j], grid[k], self.time.draw(items.names, key))
        noise = items.noise(key)
        x, x_u = items.interpolate(noise, t), items.interpolate(noise, u)
        return TrajectoryDraw(x, noise - items.latents, t, s, items, noise, u, x_u, velocity_t)

    def loss(self, call: FlowCall, draw: TrajectoryDraw) -> Terms:
        items, s, zero = draw.items, draw.s, torch.zeros_like(draw.s)
        landing = jump(call, draw.x, draw.t, s, items)
        estimate = landing - items.expand(s) * InputGradient.apply(call.target(graph=True), landing, s, zero)
        with torch.no_grad():
            target = call.target()
            goal = jump(target, jump(target, draw.x_u, draw.u, s, items), s, zero, items)
        raw = items.mean(channel_error(estimate, goal))
        loss = distance(raw, self.distance, self.huber_c)
        if self.velocity_weight > 0:
            x, t = items.interpolate(draw.noise, draw.velocity_t), draw.velocity_t
            velocity = self.velocity_weight * items.mean(channel_error(call(x, t, t), draw.v))
            loss, raw = loss + velocity, raw + velocity
        return items.terms(loss, self.weight, raw)


class InputGradient(torch.autograd.Function):
    """call(x, t, s) whose gradient reaches x only: not the weights, not the context."""

    @staticmethod
    def forward(ctx: Any, call: FlowCall, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            ctx.leaf, ctx.found = leaf, call(leaf, t, s)
        return ctx.found.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        [gradient] = torch.autograd.grad(ctx.found, ctx.leaf, gradients[0])
        return None, gradient, None, None
