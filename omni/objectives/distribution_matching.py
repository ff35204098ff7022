"""Distribution matching distillation on the model's own past: on-policy training (DMD, arXiv 2311.18828, eq. 7; DMD2,
2405.14867; Self-Forcing, 2506.08009; with flow maps AnyFlow, 2605.13724).

Every block reads samples of the model in place of the blocks before it (sequence.own_past). Its own sample is

    x^ = f(f(f(eps, 1, t_i), t_i, t_(i+1)), t_(i+1), 0),   f(x, t, s) = x + (s - t) F(x, t, s),   t_k = 1 - k / n

three jumps for any n, with a gradient through all three and none into the past. With x_t = (1 - t) x^ + t eps',

    g    = (x0_critic - x0_teacher) / mean |x^ - x0_teacher|,   x0 = x_t - t F(x_t, t, t)
    loss = mean |x^ - sg(x^ - g)|^2 / 2

The teacher is frozen and has the distribution of data given the past. The critic has that of x^: it is trained on x^ by
flow matching, `critic_steps` updates after each of the model. g is proportional to the gradient in x^ of the divergence
KL(model | teacher) of the noisy block, given the past. At t = 0 the divergences of all blocks add up to that of whole
documents (chain rule); what a sample changes in later blocks has no gradient. Only distributions are compared, so the
teacher may read its context in another way than the model.

The loss is 0 where critic and teacher agree, and its value compares no two runs: it depends on how well the critic
follows. The raw loss is the mean square of x0_critic - x0_teacher.

Legend: R batch rows, S refine positions, C channels, I items.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, FlowCall, Items, RolloutObjective, Terms, channel_error, squared_error
from omni.objectives.particles import in_float32, jump_in_float32
from omni.objectives.target_guidance import embed_scale, guide
from omni.objectives.times import TimeDistribution, uniform_I
from omni.rng import Key


@OBJECTIVES.register("distribution_matching")
class DistributionMatching(RolloutObjective):
    """steps: the values of n above; n and i are keyed by the item. time: of t for the gradient, the released one: shift
    5 in [0.02, 0.98]. critic_time: of the critic's loss; None: `time`.

    scope: the range of the mean that divides g: the paper's "item"; or the "batch", on which a loss then depends, for
    items of few numbers, whose own mean may come near 0.
    guidance_scale: w of the teacher, w F + (1 - w) F_null; 1 is none. Samples, and the critic, then have the guidance
    embedding of beta = 1 / w. teacher: a model directory; None: the weights with which training begins.
    critic_steps: 5 in Self-Forcing, 1 in AnyFlow. critic_rate: the critic's learning rates over the recipe's; 0.2 in
    Self-Forcing.
    """

    trains = ("grid_jumps",)
    steps: tuple[int, ...] = Field(default=(2, 4, 8, 16), min_length=1)
    time: TimeDistribution = TimeDistribution(kind="uniform", shift=5.0, low=0.02, high=0.98)
    critic_time: TimeDistribution | None = None
    scope: Literal["item", "batch"] = "item"
    guidance_scale: float = Field(default=1.0, ge=1)
    teacher: str | None = None
    critic_steps: int = Field(default=5, ge=1)
    critic_rate: float = Field(default=1.0, gt=0)

    @field_validator("steps")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"steps must be numbers of sampling steps, 1 or more, got {list(value)}")
        return value

    @property
    def needs_null(self) -> bool:
        return self.guidance_scale > 1

    def jump_times(self, items: Items, key: Key) -> Tensor:
        """(4, I) float64: 1, t_i, t_(i+1), 0 of each item."""
        pick = uniform_I(items.names, key, "number of steps")
        n = torch.tensor(self.steps, dtype=torch.float64)[(pick * len(self.steps)).long()]
        i = (uniform_I(items.names, key, "cell") * n).floor()
        return torch.stack([torch.ones_like(n), 1 - i / n, 1 - (i + 1) / n, torch.zeros_like(n)])

    def sample(self, call: FlowCall, items: Items, key: Key) -> Tensor:
        """x^ (R, S, C), float32 or better: three jumps from the noise of each item."""
        call, broad = self._embedded(call, items), in_float32(items)
        times = items.times(*self.jump_times(items, key))
        x = broad.noise(key)
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = jump_in_float32(call, x, t, s, items)
        return x

    def loss(self, call: FlowCall, teacher: FlowCall, critic: FlowCall, items: Items, key: Key) -> Terms:
        """An item's weight is its number of latents."""
        x, broad = self.sample(call, items, key), in_float32(items)
        [t] = items.times(self.time.draw(items.names, key))
        noisy, tt = self._noisy(x, broad.noise(key, "added noise"), t, broad), broad.expand(t)
        with torch.no_grad():
            given = noisy.to(items.latents.dtype)
            real, fake = self._guided(teacher, given, t, items), self._embedded(critic, items)(given, t, t)
            difference = tt * (real.to(x.dtype) - fake.to(x.dtype))
            distance = self._distance(x - (noisy - tt * real.to(x.dtype)), items)
            step = difference / broad.expand(distance.clamp(min=1e-6))
        error = broad.mean(channel_error(x, (x - step).detach())) / 2
        return items.terms(error, self.weight, broad.mean(difference.square().mean(-1)))

    def critic_loss(self, critic: FlowCall, x: Tensor, items: Items, key: Key) -> Terms:
        """Flow matching of the critic on samples x (R, S, C) without a graph."""
        broad = in_float32(items)
        [t] = items.times((self.critic_time or self.time).draw(items.names, key))
        noise = broad.noise(key, "added noise")
        found = self._embedded(critic, items)(self._noisy(x, noise, t, broad).to(items.latents.dtype), t, t)
        return squared_error(found, noise - x, items, 1.0)

    def _distance(self, difference: Tensor, items: Items) -> Tensor:
        """(I,): the mean absolute value of (R, S, C) over each item, or over all."""
        found = items.mean(difference.abs().mean(-1))
        if self.scope == "item":
            return found
        counts = items.counts.to(found.dtype)
        return ((found * counts).sum() / counts.sum()).expand(len(items))

    @staticmethod
    def _noisy(x: Tensor, noise: Tensor, t: Tensor, items: Items) -> Tensor:
        """(1 - t) x + t eps, without a graph."""
        tt = items.expand(t)
        return (1 - tt) * x.detach() + tt * noise

    def _embedded(self, call: FlowCall, items: Items) -> FlowCall:
        """The call with the guidance embedding of the samples."""
        return call if self.guidance_scale == 1 else embed_scale(call, items, self.guidance_scale)

    def _guided(self, teacher: FlowCall, x: Tensor, t: Tensor, items: Items) -> Tensor:
        """The teacher's velocity (R, S, C), guided for items with their condition."""
        own = teacher(x, t, t)
        return own if self.guidance_scale == 1 else guide(own, teacher, x, t, t, self.guidance_scale, items)
