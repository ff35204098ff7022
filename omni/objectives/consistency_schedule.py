"""The pairs (t, r), r < t, of discrete consistency training, and how their gap closes during training.

ect   r = max(0, t (1 - (1 + k sigmoid(-t)) / q^(stage + 1)))                                 (arXiv 2406.14548)
ict   neighbours on EDM's grid of N nodes; N doubles from 10 to 1280; the density of t, cell by cell
                                                                                              (arXiv 2310.14189)

There t and r are noise levels sigma of data of deviation `data_std`; Omni's time is t = sigma / (sigma + data_std).
So the published density log sigma ~ N(-1.1, 2.0) is log_normal(-1.1, 2.0) with shift 1 / data_std.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omni.config import Frozen
from omni.objectives.times import Name, TimeDistribution, karras_times, stratified_I
from omni.objectives.weighting import Distance
from omni.rng import Key


class ConsistencySchedule(Frozen):
    """distance: the default of the paper, for Consistency.distance = None. data_std: of data in sigma."""

    distance: ClassVar[Distance]
    data_std: float = Field(default=0.5, gt=0)

    @abstractmethod
    def draw(self, time: TimeDistribution, names: Sequence[Name], key: Key, progress: float) -> tuple[Tensor, Tensor]:
        """(t, r), each (I,) float64, in Omni's time, 0 <= r <= t."""


class EasySchedule(ConsistencySchedule):
    """ECT. stage: fixed, or None for 0, 1, ..., num_stages - 1 in equal shares of training.

    The paper increases the stage at fixed intervals, to about eight; q = 256 and one stage is its one-hour recipe.
    """

    kind: Literal["ect"] = "ect"
    distance: ClassVar[Distance] = "norm"
    q: float = Field(default=2.0, gt=1)
    k: float = Field(default=8.0, ge=0)
    stage: int | None = Field(default=None, ge=0)
    num_stages: int = Field(default=8, ge=1)

    def stage_at(self, progress: float) -> int:
        """The stage after the share `progress` of training."""
        return self.stage if self.stage is not None else min(int(progress * self.num_stages), self.num_stages - 1)

    def draw(self, time: TimeDistribution, names: Sequence[Name], key: Key, progress: float) -> tuple[Tensor, Tensor]:
        t = time.draw(names, key)
        return t, self.earlier_time(t, progress)

    def earlier_time(self, t: Tensor, progress: float) -> Tensor:
        """r of t (I,), 0 <= r < t."""
        sigma = self.data_std * t / (1 - t)
        ratio = 1 - (1 + self.k * torch.sigmoid(-sigma)) / self.q ** (self.stage_at(progress) + 1)
        ratio = ratio.clamp(min=0)
        return ratio * t / (ratio * t + (1 - t))  # of sigma_r = ratio sigma_t, without dividing by 1 - t


class ImprovedSchedule(ConsistencySchedule):
    """iCT. first, last: grid cells at the start and the end of training; the lowest node is r = 0."""

    kind: Literal["ict"] = "ict"
    distance: ClassVar[Distance] = "pseudo_huber"
    first: int = Field(default=10, ge=1)
    last: int = Field(default=1280, ge=1)
    rho: float = Field(default=7.0, gt=0)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)

    def num_nodes(self, progress: float) -> int:
        """N(k) = min(first 2^floor(k / K'), last) + 1, where K' = K / (log2(last / first) + 1)."""
        doublings = math.floor(progress * (math.floor(math.log2(self.last / self.first)) + 1))
        return min(self.first * 2**doublings, self.last) + 1

    def draw(self, time: TimeDistribution, names: Sequence[Name], key: Key, progress: float) -> tuple[Tensor, Tensor]:
        grid = karras_times(self.num_nodes(progress), self.rho, self.sigma_min, self.sigma_max, self.data_std)
        low = self.sigma_min / (self.sigma_min + self.data_std)
        edges = time.cumulative(torch.where(grid == 0, low, grid))  # the paper's lowest edge; it is 0 in `grid`
        u = edges[0] + (edges[-1] - edges[0]) * stratified_I(names, key, "time")
        cell = torch.searchsorted(edges, u, right=True).clamp(1, len(grid) - 1)
        return grid[cell], grid[cell - 1]
