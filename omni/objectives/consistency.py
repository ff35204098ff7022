"""Discrete consistency training: f(x_t, t, 0) against sg f(x_r, r, 0), r < t, on one line through x0 and eps.

loss = w(t, r) d(f(x_t, t, 0), sg f(x_r, r, 0)),   f(x, t, 0) = x - t F(x, t, 0)

The schedule of (t, r) is ECT's (arXiv 2406.14548) or iCT's (arXiv 2310.14189): see consistency_schedule. The target
uses the present weights, not an average (iCT's main correction). At r = 0 it is x0 itself, by the form of f.

w is 1 / (sigma_t - sigma_r) in the papers' clock, sigma = t / (1 - t): `ve`, (1 - t)(1 - r) / (t - r); or 1 / (t - r)
in Omni's time: `flow`, which does not vanish towards t = 1. f_t - f_r is about (t - r) df/dt, so with a root-like
distance both keep the scale of the loss as the gap closes. The papers share the dropout mask between the two passes;
Omni's network has no dropout. With guidance x_r = x_t - (t - r) v_g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, Terms, channel_error, jump
from omni.objectives.consistency_schedule import EasySchedule, ImprovedSchedule
from omni.objectives.target_guidance import GuidedDraw, GuidedObjective
from omni.objectives.times import TimeDistribution
from omni.objectives.weighting import Distance, distance
from omni.rng import Key


@dataclass(frozen=True)
class ConsistencyDraw(GuidedDraw):
    """`r` (I,): the earlier time; `x_r` (R, S, C): the point of the same line there. s = 0."""

    r: Tensor
    x_r: Tensor


@OBJECTIVES.register("consistency")
class Consistency(GuidedObjective):
    """schedule: "ect", "ict" or a table with `kind` and that schedule's options. time: the density of t.

    distance: None is the schedule's own (ect: norm, the un-squared error; ict: pseudo_huber with `huber_c`, per root
    mean square: the paper's c is 0.00054 sqrt(dim) of the norm). clock: of the weight, "ve" (sigma) or "flow" (t).
    min_gap: the smallest t - r, in Omni's time (0 in the papers); below it rounding in the network exceeds the
    difference.
    """

    trains = ("data_jumps",)
    time: TimeDistribution = TimeDistribution(kind="log_normal", mean=-1.1, std=2.0, shift=2.0)
    schedule: EasySchedule | ImprovedSchedule = Field(default=EasySchedule(), discriminator="kind")
    distance: Distance | None = None
    huber_c: float = Field(default=0.00054, gt=0)
    clock: Literal["ve", "flow"] = "ve"
    min_gap: float = Field(default=1e-4, ge=0, lt=1)

    @field_validator("schedule", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """The name of a schedule stands for a table with its `kind`."""
        return {"kind": value} if isinstance(value, str) else value

    def draw(self, items: Items, key: Key) -> ConsistencyDraw:
        t, r = self.schedule.draw(self.time, items.names, key, items.progress)
        t, r = items.times(t, torch.minimum(r, t - self.min_gap).clamp(min=0))
        noise, scale = items.noise(key), self.guidance.draw(items, key)
        x, x_r = items.interpolate(noise, t), items.interpolate(noise, r)
        return ConsistencyDraw(x, noise - items.latents, t, torch.zeros_like(t), items, noise, scale, r, x_r)

    def loss(self, call: FlowCall, draw: ConsistencyDraw) -> Terms:
        items, t, r, end = draw.items, draw.t, draw.r, draw.s
        call, v = self.guidance.apply(call, draw)
        x_r = draw.x_r if draw.scale is None else draw.x - items.expand(t - r) * v
        with torch.no_grad():
            target = jump(call, x_r, r, end, items)
        error = items.mean(channel_error(jump(call, draw.x, t, end, items), target))
        found = distance(error, self.distance or self.schedule.distance, self.huber_c)
        return items.terms(self.gap_weight(t, r) * found, self.weight, error)

    def gap_weight(self, t: Tensor, r: Tensor) -> Tensor:
        """w(t, r), (I,)."""
        weight = 1 / (t - r).clamp(min=1e-7)
        return weight * (1 - t) * (1 - r) if self.clock == "ve" else weight
