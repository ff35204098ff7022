"""Generative drifting (arXiv 2602.04770): move generated particles along V, away from one another, towards the data.

    x = phi(f(x_t, t, s)) / c,   loss = mean |x - sg(x + V)|^2,   V = sum over tau of V_tau / rms(V_tau)

phi is a feature map, V_tau the field of `drift_field`: the particles of a group are one another's negatives, and the
group's clean latents (at s > 0: samples of p_s) are its positives. c = mean distance / sqrt(D). Distances are in units
of the mean distance, so a temperature has the same meaning everywhere. The defaults are the released loss. t = 1, s = 0
unless `pairs` differs; then x_t and x_s share one x0, and a particle does not see its own positive.

The loss value is not informative: with one temperature V has mean square 1, so it is exactly 1, whatever the network
computes; with three it is between 1 and 9, depending on how far they agree. What falls in training is the mean square
of V_tau before normalisation: `force`, which is `Terms.raw`, or the reported value with report = "force" (gradients are
the same). With few particles most of it is sampling noise. Few particles are also unstable: each side of V has mass 1
at any distance, so two particles, each the only negative of the other, move apart without bound.

Guidance: the clean latents of items without their condition are extra negatives for all others of their size in the
batch, with weight (alpha - 1) (n_generated - 1) / n_null; the guidance embedding is of beta = 1 / alpha. In a batch
without such items alpha = 1.

Without a trained feature map this failed on ImageNet [paper]. It also needs many positives per context, which documents
with one caption each do not give: "mixed" groups then match the distribution over contexts, not within one.

Legend: I items, G groups, M particles, N latents, C channels, T targets, D numbers in a feature vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omni.config import Frozen
from omni.objectives.base import OBJECTIVES, Draw, FlowCall, Items, Terms
from omni.objectives.drift_field import Affinity, Targets, distances, drift
from omni.objectives.features import FEATURES
from omni.objectives.particles import Groups, ParticleObjective, gather, group_items, in_float32, jump_in_float32
from omni.objectives.times import uniform_I
from omni.rng import Key


class SampleGuidance(Frozen):
    """alpha of a group: 1 with probability `plain`, else in [1, max_scale] with density alpha^-power. max_scale = 1 is
    off; the
    paper: max_scale 4, power 3 (or 5), plain 0.5."""

    max_scale: float = Field(default=1.0, ge=1)
    power: float = Field(default=3.0, ge=0)
    plain: float = Field(default=0.5, ge=0, le=1)

    @property
    def is_off(self) -> bool:
        return self.max_scale == 1

    def draw(self, groups: Groups, key: Key) -> Tensor:
        """(number of groups,) float64."""
        u, q = uniform_I(groups.names, key, "guidance"), 1 - self.power
        alpha = self.max_scale**u if q == 0 else (1 + u * (self.max_scale**q - 1)) ** (1 / q)
        return torch.where(uniform_I(groups.names, key, "no guidance") < self.plain, 1.0, alpha)


@dataclass(frozen=True)
class DriftDraw(Draw):
    """`positives` (R, S, C): a sample of p_s from each item's x0; `alpha` (I,): guidance. x: float32 or better."""

    positives: Tensor
    alpha: Tensor
    groups: Groups


@dataclass(frozen=True)
class Goal:
    """For one kind of group and one feature family: the particles and their targets, both in units of c.

    `x` (G, M, D) has a graph, `goal` has none; `force` (G, M): mean square of V_tau, summed over temperatures.
    """

    x: Tensor
    goal: Tensor
    force: Tensor


@OBJECTIVES.register("drifting")
class Drifting(ParticleObjective):
    """particles: the size of a group; the paper: 64 per class. temperatures: tau above, in mean distances.

    features: a name in FEATURES. affinity: "joint" (released) or "row" (the paper's field); `min_affinity`: of the
    joint one's product. unit_distance: distances and coordinates in mean distances; else tau is in units of the
    features.
    unit_force: each V_tau divided by its root mean square. scope: the range of those means. With the released code's
    "batch" a loss depends on the rest of the batch; with "group", Omni's default, it does not. The paper's plain field
    is affinity="row", unit_force=false.
    """

    pairs: Literal["below", "zero", "one_step"] = "one_step"
    particles: int = Field(default=64, ge=1)
    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    features: str = "latents"
    affinity: Affinity = "joint"
    min_affinity: float = Field(default=1e-6, ge=0)
    unit_distance: bool = True
    unit_force: bool = True
    scope: Literal["group", "batch"] = "group"
    guidance: SampleGuidance = SampleGuidance()
    report: Literal["loss", "force"] = "loss"

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError(f"temperatures must be one or more positive numbers, got {list(value)}")
        return value

    @field_validator("features")
    @classmethod
    def _known(cls, value: str) -> str:
        FEATURES.get(value)
        return value

    def draw(self, items: Items, key: Key) -> DriftDraw:
        groups, broad = group_items(items, self.particles, self.groups, apart=True), in_float32(items)
        t, s = (time[groups.index] for time in self.group_times(groups, key))
        [alpha] = items.times(self.guidance.draw(groups, key)[groups.index])
        alpha = torch.where(self._guided(items), alpha, 1.0)
        t, s = items.times(t, s)
        noise, positives = broad.noise(key), broad.latents
        if self.pairs == "below":
            positives = broad.interpolate(broad.noise(key, "noise of positives"), s)
        x = broad.interpolate(noise, t)
        return DriftDraw(x, noise - broad.latents, t, s, items, noise, positives, alpha, groups)

    def loss(self, call: FlowCall, draw: DriftDraw) -> Terms:
        goals = list(self.goals(call, draw))
        found = [torch.stack([(g.x - g.goal).pow(2).mean(-1) for g in families]).mean(0) for families in goals]
        loss = draw.groups.spread(torch.zeros_like(draw.t), found)
        force = self._force(goals, draw)
        if self.report == "force":
            loss = force + (loss - loss.detach())
        return draw.items.terms(loss, self.weight, force)

    @torch.no_grad()
    def force(self, call: FlowCall, draw: DriftDraw) -> Tensor:
        """(I,): the mean square of V before normalisation, summed over temperatures, mean over feature families."""
        return self._force(self.goals(call, draw), draw)

    def _force(self, goals: Iterable[list[Goal]], draw: DriftDraw) -> Tensor:
        """(I,): `force` of goals that are computed already."""
        found = [torch.stack([g.force for g in families]).mean(0) for families in goals]
        return draw.groups.spread(torch.zeros_like(draw.t), found)

    def goals(self, call: FlowCall, draw: DriftDraw) -> Iterator[list[Goal]]:
        """One goal per feature family, for each kind of group."""
        items = draw.items
        embedded = call if self.guidance.is_off else call.guided(1 / draw.alpha)
        y = jump_in_float32(embedded, draw.x, draw.t, draw.s, items)
        for members in draw.groups.members:
            others = self._nulls(items, members)
            generated, data = (self._features(gather(items, value, members)) for value in (y, draw.positives))
            nulls = self._features(gather(items, draw.positives, others)) if others is not None else data
            alpha = draw.alpha[members[:, :1]]
            yield [
                self.goal(x, self._targets(x.detach(), p.detach(), None if others is None else n.detach(), alpha))
                for x, p, n in zip(generated, data, nulls, strict=True)
            ]

    def goal(self, x_GMD: Tensor, targets: Targets) -> Goal:
        """x and its target under drift, in units of c."""
        per_group, dim, particles = self.scope == "group", x_GMD.shape[-1], x_GMD.detach()
        with torch.no_grad():
            distance, mean = distances(particles, targets, per_group=per_group)
            unit = mean if self.unit_distance else torch.ones_like(mean)
            c = (mean / dim**0.5).clamp(min=1e-3) if self.unit_distance else unit
            scaled = Targets(targets.vectors / c, targets.num_negatives, targets.weight, targets.own)
            total, force = torch.zeros_like(particles), 0.0
            for tau in self.temperatures:
                v = drift(particles / c, scaled, distance / unit / tau, self.affinity, self.min_affinity)
                force = force + v.pow(2).mean(-1)
                square = v.pow(2).mean((1, 2) if per_group else (0, 1, 2), keepdim=True)
                total += v / square.clamp(min=1e-8).sqrt() if self.unit_force else v
        return Goal(x_GMD / c, particles / c + total, force)  # type: ignore[arg-type]

    def _targets(self, x_GMD: Tensor, data_GMD: Tensor, nulls_1KD: Tensor | None, alpha_G1: Tensor) -> Targets:
        """Targets of a kind of group: its particles and the items without condition (negatives), then the data
        (positives). alpha_G1: guidance."""
        num_groups, num = x_GMD.shape[:2]
        one = torch.ones(num_groups, num, device=x_GMD.device, dtype=x_GMD.dtype)
        extra = x_GMD[:, :0] if nulls_1KD is None else nulls_1KD.expand(num_groups, -1, -1)
        weight = ((alpha_G1 - 1) * (num - 1) / max(extra.shape[1], 1)).to(x_GMD.dtype).expand(-1, extra.shape[1])
        itself = torch.eye(num, device=x_GMD.device, dtype=torch.bool)
        related = itself if self.pairs != "one_step" and self.groups == "mixed" else torch.zeros_like(itself)
        own = torch.cat([itself, itself.new_zeros(num, extra.shape[1]), related], 1)
        vectors = torch.cat([x_GMD, extra, data_GMD], 1)
        return Targets(vectors, num + extra.shape[1], torch.cat([one, weight, one], 1), own)

    def _guided(self, items: Items) -> Tensor:
        """(I,) bool: items with a condition, of the size of some item without one."""
        if items.is_null is None or self.guidance.is_off:
            return torch.zeros(len(items), dtype=torch.bool, device=items.latents.device)
        return ~items.is_null & torch.isin(items.counts, items.counts[items.is_null])

    def _nulls(self, items: Items, members_GM: Tensor) -> Tensor | None:
        """(1, K): the items without condition of the members' size; None if the members need none."""
        first = members_GM[0, 0]
        if items.is_null is None or self.guidance.is_off or bool(items.is_null[first]):
            return None
        found = (items.is_null & (items.counts == items.counts[first])).nonzero().mT
        return found if found.numel() else None

    def _features(self, x_GMNC: Tensor) -> list[Tensor]:
        """(G, M, N, C) -> families of (G, M, D)."""
        return [f.unflatten(0, x_GMNC.shape[:2]) for f in FEATURES.get(self.features)(x_GMNC.flatten(0, 1))]
