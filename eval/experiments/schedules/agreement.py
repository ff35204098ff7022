"""The sampler against computations that do not call it: the largest difference of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from eval.experiments.schedules.gaussian import BlockGaussian
from eval.experiments.schedules.limits import (
    context_limit,
    independence_divergence,
    pair_limit,
    pair_recursion,
    smoothing_gradient,
    staggered_limit,
)
from eval.experiments.schedules.sampling import FinishedContext, Pass, euler, flow_map, output_covariance
from omni.rng import Key
from omni.sequence.schedule import Schedule, level_major, masked_order, staggered


@dataclass(frozen=True)
class Agreement:
    """gaussian: the data. lags: delays over S. correlations: of two blocks. steps: S of the checks at finite S; many:
    S of Heun steps against the limit. contexts: how finished blocks are read."""

    gaussian: BlockGaussian
    lags: Sequence[float]
    correlations: Sequence[float]
    steps: int
    many: int
    contexts: Sequence[FinishedContext]

    def recursion(self) -> float:
        """Two blocks, causal, Euler steps, against `pair_recursion`: S, lags, correlations, contexts."""
        worst = 0.0
        for rho in self.correlations:
            for lag in self.lags:
                schedule = lagged(2, self.steps, lag)
                for finished in (FinishedContext(), *self.contexts):
                    wanted = as_matrix(pair_recursion(rho, schedule, finished))
                    found = output_covariance(BlockGaussian(2, rho), schedule, finished=finished)
                    worst = max(worst, largest(found - wanted))
        return worst

    def pair(self) -> float:
        """`pair_limit` against the differential equation."""
        pairs = [(rho, lag) for rho in self.correlations for lag in self.lags]
        return max(
            largest(staggered_limit(BlockGaussian(2, rho), lag, "before") - as_matrix(pair_limit(rho, lag)))
            for rho, lag in pairs
        )

    def context(self) -> float:
        """`context_limit` against the differential equation, one block after the other."""
        return max(
            largest(context_limit(self.gaussian, each) - staggered_limit(self.gaussian, 1.0, "finished", each))
            for each in self.contexts
            if each.noise != "fresh"
        )

    def heun(self) -> float:
        """Heun steps at S = many against the differential equation: causal at every lag, and contexts at lag 1."""
        lines = [(lag, FinishedContext()) for lag in self.lags]
        lines += [(1.0, each) for each in self.contexts if each.noise != "fresh"]
        B, worst = self.gaussian.num_blocks, 0.0
        for lag, finished in lines:
            found = output_covariance(self.gaussian, lagged(B, self.many, lag), "heun", finished)
            worst = max(worst, largest(found - staggered_limit(self.gaussian, lag, "before", finished)))
        return worst

    def joint_map(self) -> float:
        """Joint flow maps of a few causal jumps against the differential equation: S = 4, which all lags divide."""
        B = self.gaussian.num_blocks
        return max(
            largest(output_covariance(self.gaussian, lagged(B, 4, lag), "joint_map")
                    - staggered_limit(self.gaussian, lag, "before"))
            for lag in self.lags if lag * 4 % 1 == 0
        )  # fmt: skip

    def masked(self, rounds: Sequence[int], order: Key) -> float:
        """KL of masked order against the chain rule."""
        return max(
            abs(self.gaussian.divergence(output_covariance(self.gaussian, schedule, "flow_map"))
                - independence_divergence(self.gaussian, schedule))
            for schedule in (masked_order(self.gaussian.num_blocks, n, order) for n in rounds)
        )  # fmt: skip

    def smoothing(self, time: float) -> float:
        """The gradient step of distribution smoothing against C (C + sigma^2)^-1 C."""
        return largest(smoothed(self.gaussian, time) - smoothing_gradient(self.gaussian, time))


def lagged(num_blocks: int, steps: int, lag: float) -> Schedule:
    """Staggered and causal: a block starts lag x S passes after the one before it."""
    return staggered(num_blocks, steps, Fraction(str(lag)) * steps)


def smoothed(gaussian: BlockGaussian, time: float) -> Tensor:
    """The output's covariance (B, B): exact autoregressive samples at `time`, then one gradient step of all blocks."""
    B = gaussian.num_blocks
    first = [row for row in level_major(B, 2).levels if min(row) > 0]
    schedule = Schedule((*first, (0,) * B), 2, "all")

    def step(p: Pass) -> dict[int, Tensor]:
        """An Euler step to data is E[x | x~]: the gradient step, by Tweedie's formula."""
        return euler(p) if p.m == B else flow_map(p)

    return output_covariance(gaussian, schedule, step, times=(1.0, time, 0.0))


def as_matrix(pair: tuple[float, float, float]) -> Tensor:
    """(2, 2) of Var x_1, Cov(x_1, x_2), Var x_2."""
    first, cross, second = pair
    return torch.tensor([[first, cross], [cross, second]], dtype=torch.float64)


def largest(difference: Tensor) -> float:
    """The largest absolute entry."""
    return float(difference.abs().max())
