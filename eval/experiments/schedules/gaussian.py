"""A stationary Gaussian sequence of blocks, and its exact conditional distributions given blocks at any times.

Data: x_b = correlation x_(b-1) + sqrt(1 - correlation^2) e_b, unit variance. Noisy: x = (1 - t) x0 + t eps, with noise
of its own for each block. A block is one number: more numbers would be independent copies.

Two states of one block are coupled in one of two ways. Both have the same distribution at each time:

    markov   noise is added to the cleaner one: x(t) = a x(s) + sqrt(t^2 - a^2 s^2) z, a = (1 - t) / (1 - s), as in
             ancestral sampling (arXiv 2006.11239, 2107.00630)
    shared   both have the same eps: two points of one straight path

Legend: B blocks, R states that are read, C other states. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Coupling = Literal["markov", "shared"]


class State(NamedTuple):
    """A block at a time in [0, 1]; 0 is data."""

    block: int
    time: float


@dataclass(frozen=True)
class BlockGaussian:
    """The AR(1) sequence of `num_blocks` blocks with `correlation` in (-1, 1) between neighbours."""

    num_blocks: int
    correlation: float

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}")
        if not -1 < self.correlation < 1:
            raise ValueError(f"the correlation must be in (-1, 1), got {self.correlation}; at 1 all blocks are equal")

    @cached_property
    def covariance(self) -> Tensor:
        """(B, B): correlation^|i - j|."""
        place = torch.arange(self.num_blocks)
        return self.correlation ** (place[:, None] - place).abs().double()

    def between(self, rows: Sequence[State], columns: Sequence[State], coupling: Coupling = "markov") -> Tensor:
        """(R, C): covariances of two lists of states."""
        (i, t), (j, s) = _columns(rows), _columns(columns)
        t = t[:, None]
        high, low = torch.maximum(t, s), torch.minimum(t, s)
        markov = torch.where(high == low, high**2, (1 - high) / (1 - low).clamp_min(1e-300) * low**2)
        noise = high * low if coupling == "shared" else markov
        return self.covariance[i][:, j] * (1 - t) * (1 - s) + torch.where(i[:, None] == j, noise, 0.0)

    def posterior(self, target: State, read: Sequence[State], coupling: Coupling = "markov") -> tuple[Tensor, float]:
        """The target given the states that are read: coefficients (R,) of its mean, and its variance.

        The result is cached: do not write into it.
        """
        return _posterior(self, target, tuple(read), coupling)

    def error(self, covariance_BB: Tensor) -> float:
        """The largest difference of an entry from the true covariance."""
        return float((covariance_BB - self.covariance).abs().max())

    def divergence(self, covariance_BB: Tensor) -> float:
        """KL(N(0, covariance) | truth) in nats; infinite for a singular matrix."""
        root = torch.linalg.cholesky(self.covariance)
        half = torch.linalg.solve_triangular(root, covariance_BB, upper=False)
        ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.mT, upper=False))
        return float((ratios - 1 - ratios.log()).sum() / 2) if bool(ratios[0] > 1e-13) else float("inf")


@lru_cache(maxsize=1 << 17)
def _posterior(
    gaussian: BlockGaussian, target: State, read: tuple[State, ...], coupling: Coupling
) -> tuple[Tensor, float]:
    """See BlockGaussian.posterior."""
    cross = gaussian.between([target], read, coupling)[0]
    weights = torch.linalg.solve(gaussian.between(read, read, coupling), cross)
    return weights, float(gaussian.between([target], [target], coupling)) - float(weights @ cross)


def _columns(states: Sequence[State]) -> tuple[Tensor, Tensor]:
    """Blocks and times."""
    blocks = torch.tensor([state.block for state in states], dtype=torch.int64)
    return blocks, torch.tensor([state.time for state in states], dtype=torch.float64)
