"""Inductive Moment Matching (arXiv 2503.07565): jumps from t and from r to s should have one distribution.

For a group of M particles that share s <= r < t, with x_t and x_r on one line through (x0, eps),

    y_t = f(x_t, t, s),   y_r = sg f(x_r, r, s),   f(x, t, s) = x + (s - t) F(x, t, s)
    L   = w(t) / M^2 sum_jk [k(y_t^j, y_t^k) + k(y_r^j, y_r^k) - 2 k(y_t^j, y_r^k)]          (V-statistic, eq. 12)
    r   = max(s, min(t - min_gap, eta^-1(eta_t - 160 / 2^k))),   eta = t / (1 - t)
    w   = sigmoid(b - lambda) / 2 (-dlambda/dt) (1 - t)^a / ((1 - t)^2 + t^2)                 (eq. 13)

with the kernel of `kernels`. Its scale is 1 / |c_out(s, t)| = 1 / (t - s) for this f: the two-time c_out, not the 1 / t
of c_out(t) that a well-known port uses.

Special cases: one particle, s = 0 and the kernel -d^2 is twice consistency training; t = 1, r = s = 0 (pairs =
"one_step") is a generative moment matching network (arXiv 1502.02761).

Choices that the paper leaves open
    contexts     see `particles`: "mixed" groups (the paper's, where a label is a context), or "copies"
    dropout      whether the two passes share it: Omni's network has none
    r = s        the target is then x_s itself, exactly: f(x, s, s) = x
    s near t     the kernel's scale grows as distances shrink; in it t - s is at least `kernel_gap`
    c_in         of the network, not the objective (Omni's networks take x itself)
    ranks        a group never leaves its batch; a group cut by the batch's edge is smaller

Legend: I items, G groups, M particles, D numbers in a particle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, Items, Terms
from omni.objectives.kernels import Kernel, squared_discrepancy
from omni.objectives.particles import Groups, ParticleObjective, gather, group_items, in_float32, jump_in_float32
from omni.objectives.weighting import elbo_sigmoid
from omni.rng import Key


def inner_time(t: Tensor, s: Tensor, k: float, min_gap: float) -> Tensor:
    """r(s, t) of the module docstring, float64. eta(r) = eta(t) - 160 / 2^k in a form that is valid at t = 1."""
    step = 160 / 2**k * (1 - t)
    r = torch.where(step < t, (t - step) / (1 - step), 0.0)  # step < t <= 1, so the quotient is in (0, 1]
    return torch.maximum(s, torch.minimum(t - min_gap, r))


@dataclass(frozen=True)
class MomentDraw(Draw):
    """`r` (I,): the time of the target; `x_r` (R, S, C): the same lines there. Both x are float32 or better."""

    r: Tensor
    x_r: Tensor
    groups: Groups


@OBJECTIVES.register("moment_matching")
class MomentMatching(ParticleObjective):
    """time: t is uniform in [0, 0.994], the paper's for latents (pixels: low 0.006). particles: the paper's 4. One is
    consistency training: as good on easy 2-D data if r is near t; it collapses at pairs = "one_step".

    k: r is 160 / 2^k below t in the clock eta; the paper's 12 for ImageNet latents, 15 for CIFAR (10 to 15 usable).
    min_gap: the smallest t - r: 1e-4, the paper's for half precision; 0 in its TF32 runs. Without it, t - r is 1.4e-6
    at t = 0.994 and k = 12.
    weighting: "elbo" with `bias` (b: 4 for latents, 5 for CIFAR) and `power` (a: 1; 2 for many steps or half
    precision), or "one".
    kernel: the paper's Laplace; `output`: whose c_out scales it. "velocity" is 1 / (t - s). For networks with other
    outputs "simple_edm" is sqrt((1 - t)^2 + t^2) / (t - s) and "x" is t / (t - s).
    root: minimise the square root of a group's discrepancy, as in some moment matching networks.
    target_decay: None: y_r uses the present weights, as in the paper; else averaged ones.
    """

    k: float = Field(default=12.0, ge=0)
    min_gap: float = Field(default=1e-4, ge=0, lt=1)
    kernel: Kernel = Kernel()
    output: Literal["velocity", "simple_edm", "x"] = "velocity"
    kernel_gap: float = Field(default=1e-6, gt=0)
    weighting: Literal["elbo", "one"] = "elbo"
    bias: float = 4.0
    power: float = Field(default=1.0, ge=0)
    root: bool = False
    target_decay: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> MomentMatching:
        unread = {"k", "min_gap"} & self.model_fields_set if self.pairs == "one_step" else set()
        if unread:
            raise ValueError(f"{sorted(unread)} have no effect with pairs='one_step', where r = s; leave them out")
        return self

    def draw(self, items: Items, key: Key) -> MomentDraw:
        groups, broad = group_items(items, self.particles, self.groups), in_float32(items)
        t, s = self.group_times(groups, key)
        r = s if self.pairs == "one_step" else inner_time(t, s, self.k, self.min_gap)
        t, s, r = items.times(t[groups.index], s[groups.index], r[groups.index])
        noise = broad.noise(key)
        x, x_r = broad.interpolate(noise, t), broad.interpolate(noise, r)
        return MomentDraw(x, noise - broad.latents, t, s, items, noise, r, x_r, groups)

    def loss(self, call: FlowCall, draw: MomentDraw) -> Terms:
        """A group's discrepancy times w(t), for each of its items."""
        weight = elbo_sigmoid(draw.t, self.bias, self.power) if self.weighting == "elbo" else torch.ones_like(draw.t)
        found = self.discrepancy(call, draw)
        return draw.items.terms(weight * found, self.weight, found)

    def discrepancy(self, call: FlowCall, draw: MomentDraw, *, diagonals: bool = True) -> Tensor:
        """(I,): the squared MMD of each item's group (its root with `root`). Without the diagonals it is unbiased."""
        found = []
        for y, z, scale in self.particle_pairs(call, draw):
            value = squared_discrepancy(y, z, self.kernel, scale, diagonals=diagonals)
            found.append((value.clamp(min=1e-16).sqrt() if self.root else value)[:, None])
        return draw.groups.spread(torch.zeros_like(draw.t), found)

    def particle_pairs(self, call: FlowCall, draw: MomentDraw) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(y_t, y_r, scale of the kernel) for each kind of group: (G, M, D) with a graph, (G, M, D) without, (G,)."""
        t, s, items = draw.t, draw.s, draw.items
        with torch.no_grad():
            y_r = jump_in_float32(call if self.target_decay is None else call.target(), draw.x_r, draw.r, s, items)
        y_t, scale = jump_in_float32(call, draw.x, t, s, items), self.kernel_scale(t, s)
        for members in draw.groups.members:
            yield gather(items, y_t, members).flatten(2), gather(items, y_r, members).flatten(2), scale[members[:, 0]]

    def kernel_scale(self, t: Tensor, s: Tensor) -> Tensor:
        """1 / |c_out(s, t)|."""
        width = {"velocity": torch.ones_like(t), "simple_edm": ((1 - t) ** 2 + t**2).sqrt(), "x": t}[self.output]
        return width / (t - s).clamp(min=self.kernel_gap)
