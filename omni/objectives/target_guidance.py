"""Guidance in training: the guided velocity replaces v, so that a guided step is one evaluation.

    v_g = w (1 - k) v + (1 - w (1 - k) - k) F(x_t, t, t, null) + k F(x_t, t, t)                  w: scale, k: mix

    k = 0          w v + (1 - w) F_null                        TVM (arXiv 2511.19797)
    k fixed        MeanFlow's omega, kappa with w = omega / (1 - kappa)             (arXiv 2505.13447)
    k = 1 - 1/w    v + (1 - 1/w) (F - F_null)                  improved MeanFlow (arXiv 2512.02012)

All three have the same fixed point w E[v] + (1 - w) F_null. The guidance embedding is of beta = 1 / w; the null branch
and items without their condition train plain v at beta = 1. Outside the interval [low, high] of t the velocity is
plain, with the same embedding of w, which stands for the whole field along the path. Improved MeanFlow also samples and
embeds the interval; Omni's network has no input for it. At scale 1 nothing here runs and no null context is needed.

Legend: I items.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.config import Frozen
from omni.objectives.base import Draw, FlowCall, FlowObjective, Items
from omni.objectives.times import uniform_I
from omni.rng import Key


class TargetGuidance(Frozen):
    """The amount of guidance, its interval of time, and the network that it uses.

    scale: w, 1 is none. max_scale: if given, w is sampled from [scale, max_scale] with density w^-power (improved
    MeanFlow: 1, 8 and power 1). mix: k above; "inverse" is 1 - 1/w. averaged: its velocities come from
    `FlowCall.target()`, an average of decay `average_decay`, instead of the present weights.
    MeanFlow's best run: scale 2.5, mix 0.92, interval [0.3, 0.8].
    """

    scale: float = Field(default=1.0, ge=1)
    max_scale: float | None = None
    power: float = Field(default=1.0, ge=0)
    mix: float | Literal["inverse"] = 0.0
    low: float = Field(default=0.0, ge=0, le=1)
    high: float = Field(default=1.0, ge=0, le=1)
    averaged: bool = False
    average_decay: float = Field(default=0.99, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> TargetGuidance:
        if self.max_scale is not None and self.max_scale <= self.scale:
            raise ValueError(f"max_scale must be above scale, got {self.max_scale} and {self.scale}")
        if self.mix != "inverse" and not 0 <= self.mix < 1:
            raise ValueError(f"mix must be in [0, 1) or 'inverse', got {self.mix}")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low={self.low}, high={self.high}")
        return self

    @property
    def is_off(self) -> bool:
        return self.scale == 1.0 and self.max_scale is None

    def draw(self, items: Items, key: Key) -> Tensor | None:
        """The scale w (I,) of each item, 1 for items without their condition; None: no guidance."""
        if self.is_off:
            return None
        u = uniform_I(items.names, key, "guidance")
        low, high, q = self.scale, self.max_scale or self.scale, 1 - self.power
        w = low * (high / low) ** u if q == 0 else (low**q + u * (high**q - low**q)) ** (1 / q)
        [w] = items.times(w)
        return w if items.is_null is None else torch.where(items.is_null, 1.0, w)

    def apply(self, call: FlowCall, draw: GuidedDraw) -> tuple[FlowCall, Tensor]:
        """The call with the guidance embedding of each item, and the velocity (R, S, C) of its targets, without a
        graph."""
        if draw.scale is None:
            return call, draw.v
        w, t, items = draw.scale, draw.t, draw.items
        embedded = call.guided(1 / w)
        network = embedded.target() if self.averaged else embedded
        mix = 1 - 1 / w if self.mix == "inverse" else torch.full_like(w, self.mix)
        with torch.no_grad():
            null = network.null()(draw.x, t, t)
            own = null if self.mix == 0 else network(draw.x, t, t)  # not used at mix 0
            guided = guided_velocity(draw.v, own, null, items.expand(w), items.expand(mix))
        inside = items.expand((w > 1) & (t >= self.low) & (t <= self.high)) > 0
        return embedded, torch.where(inside, guided.to(draw.v.dtype), draw.v)


def guided_velocity(v: Tensor, own: Tensor, null: Tensor, w: Tensor | float, mix: Tensor | float = 0.0) -> Tensor:
    """v_g of the module docstring, elementwise. v: the sample's velocity; own, null: the network's two."""
    return w * (1 - mix) * v + (1 - w * (1 - mix) - mix) * null + mix * own


def embed_scale(call: FlowCall, items: Items, w: float, where_I: Tensor | None = None) -> FlowCall:
    """The call with the guidance embedding of beta = 1 / w for items with their condition (in `where_I`), and 1 for
    others."""
    return call.guided(torch.where(_conditioned(items, where_I), 1 / w, 1.0))


def guide(
    own: Tensor, network: FlowCall, x: Tensor, t: Tensor, s: Tensor, w: float, items: Items,
    where_I: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """w F + (1 - w) F_null (R, S, C) at (x, t, s) for the same items, and `own` = F for the others."""
    guided = guided_velocity(own, own, network.null()(x, t, s), w)
    return torch.where(items.expand(_conditioned(items, where_I)) > 0, guided.to(own.dtype), own)


def _conditioned(items: Items, where_I: Tensor | None) -> Tensor:
    """(I,) bool: the items with their condition, in `where_I` if given."""
    where = torch.ones(len(items), dtype=torch.bool, device=items.latents.device) if where_I is None else where_I
    return where if items.is_null is None else where & ~items.is_null


@dataclass(frozen=True)
class GuidedDraw(Draw):
    """`scale`: guidance w (I,) of each item; None without guidance."""

    scale: Tensor | None


class GuidedObjective(FlowObjective, ABC):
    """An objective whose velocity may be guided: `loss` starts with `call, v = self.guidance.apply(call, draw)`."""

    guidance: TargetGuidance = TargetGuidance()

    @property
    def needs_null(self) -> bool:
        return not self.guidance.is_off

    @property
    def target_decay(self) -> float | None:
        """The decay of the averaged weights for `guidance.averaged`; else None."""
        return self.guidance.average_decay if self.guidance.averaged and not self.guidance.is_off else None

    def draw(self, items: Items, key: Key) -> GuidedDraw:
        return GuidedDraw(**vars(super().draw(items, key)), scale=self.guidance.draw(items, key))
