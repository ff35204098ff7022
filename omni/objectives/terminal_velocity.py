"""Terminal Velocity Matching (arXiv 2511.19797): the end of a jump moves with the velocity at that point.

    f(x_t, t, s) = x_t + (s - t) F(x_t, t, s)
    df/ds        = F + (s - t) dF/ds                            (x_t and t held; gradients flow through dF/ds too)
    terminal     = beta^2 |df/ds - sg F_target(sg f, s, s)|^2   (0 where s = t)
    flow         = beta^2 |F(x_s', s', s') - sg(w v + (1 - w) F_target(x_s', s', s' | no condition))|^2
    loss         = terminal + flow,  beta = 1 / w in F's guidance embedding, s' a time of its own

F_target has averaged weights (`target_decay`). `scaled`: w F replaces F in f, df/ds, at the end point and in the flow
term, so that F itself depends little on w; never for the velocity without condition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.objectives.base import OBJECTIVES, Draw, FlowCall, FlowObjective, Items, Terms, channel_error
from omni.objectives.times import PairDistribution, TimeDistribution, stratified_I
from omni.rng import Key


@dataclass(frozen=True)
class TerminalDraw(Draw):
    """x_t at (t, s) for the terminal term; `flow_x`, `flow_t`: x_s' and s' of the same noise, for the flow term."""

    flow_x: Tensor  # (R, S, C)
    flow_t: Tensor  # (I,)
    beta: Tensor  # (I,) 1 / w


@OBJECTIVES.register("terminal_velocity")
class TerminalVelocity(FlowObjective):
    """`time`: of s'. `pair`: of (t, s). `target_decay`: of the target's average; None or 0: the present weights.

    guidance_scale: w of every item; or guidance_range (low, high): beta uniform in [1 / high, 1 / low]. Items without
    their condition have w = 1. detach_tangent: no gradient through dF/ds; cheaper, and biased. scaled: see above; the
    engine's jumps do not multiply F by w, so it is for experiments with a call of their own. The defaults are the
    published values, except guidance, which is off (published: w of 1.75 to 2.5; beta in [0, 1], which makes w
    unbounded, is not supported).
    """

    trains = ("jumps", "velocity")
    time: TimeDistribution = TimeDistribution(mean=-0.4)
    pair: PairDistribution = PairDistribution(kind="gap", time=TimeDistribution(mean=-0.4))
    target_decay: float | None = Field(default=0.99, ge=0, lt=1)
    detach_tangent: bool = False
    scaled: bool = False
    guidance_scale: float = Field(default=1.0, gt=0)
    guidance_range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> TerminalVelocity:
        if self.guidance_range is not None and not 0 < self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range must be (low, high) with 0 < low <= high, got {self.guidance_range}")
        if self.guidance_range is not None and self.guidance_scale != 1:
            raise ValueError(
                f"give guidance_scale ({self.guidance_scale}) or guidance_range {self.guidance_range}, not both"
            )
        return self

    @property
    def needs_null(self) -> bool:
        return self.guidance_scale != 1 or self.guidance_range is not None

    def times(self, items: Items, key: Key) -> tuple[Tensor, Tensor]:
        """(t, s), each (I,) float64, of the terminal term."""
        return self.pair.draw(items.names, key)

    def draw(self, items: Items, key: Key) -> TerminalDraw:
        base = super().draw(items, key)
        own, beta = items.times(self.time.draw(items.names, key, "flow time"), self._beta(items, key))
        return TerminalDraw(**vars(base), flow_x=items.interpolate(base.noise, own), flow_t=own, beta=beta)

    def _beta(self, items: Items, key: Key) -> Tensor:
        """(I,) float64."""
        if self.guidance_range is None:
            beta = torch.full((len(items),), 1 / self.guidance_scale, dtype=torch.float64)
        else:
            low, high = (1 / w for w in reversed(self.guidance_range))
            beta = low + (high - low) * stratified_I(items.names, key, "guidance")
        return beta if items.is_null is None else torch.where(items.is_null.to(beta.device), 1.0, beta)

    def loss(self, call: FlowCall, draw: Draw) -> Terms:
        assert isinstance(draw, TerminalDraw)
        call = call.guided(draw.beta)
        error = torch.where(draw.s == draw.t, 0.0, self.terminal_error(call, draw)) + self.flow_error(call, draw)
        return draw.items.terms(draw.beta.pow(2) * error, self.weight, error)

    def terminal_error(self, call: FlowCall, draw: TerminalDraw) -> Tensor:
        """(I,) mean over a block of |df/ds - velocity at the end point|^2."""
        x, t, s, expand = draw.x, draw.t, draw.s, draw.items.expand
        direction = torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(s)
        if self.detach_tangent:
            flow, rate = call(x, t, s), call.derivative(x, t, s, *direction)
        else:
            flow, rate = call.with_derivative(x, t, s, *direction)
        factor = expand(1 / draw.beta) if self.scaled else 1.0
        gap = expand(s - t)
        landing = (x + gap * factor * flow).detach()
        target = factor * call.target()(landing, s, s).detach()
        return draw.items.mean(channel_error(factor * (flow + gap * rate), target))

    def flow_error(self, call: FlowCall, draw: TerminalDraw) -> Tensor:
        """(I,) mean over a block of |velocity - guided velocity|^2; without guidance it is flow matching."""
        x, t, v = draw.flow_x, draw.flow_t, draw.v
        w = draw.items.expand(1 / draw.beta)
        target = v
        if self.needs_null:
            target = (w * v + (1 - w) * call.target().null()(x, t, t)).detach()
        return draw.items.mean(channel_error((w if self.scaled else 1.0) * call(x, t, t), target))
