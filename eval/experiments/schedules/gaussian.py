"""A stationary Gaussian sequence of blocks, and its exact conditional velocities at any vector of times.

Data: x_b = correlation x_(b-1) + sqrt(1 - correlation^2) e_b, unit variance. Noisy: x = (1 - tau) x0 + tau eps, one
time and one noise per block. A block's velocity is E[eps_b - x0_b | the blocks that it reads], linear in what is read.

Legend: N samples, B blocks, D independent numbers per block. Everything is float64. The cost is that of solving B
systems of size B per pass: these are formulas for small B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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

    @cached_property
    def _identity_BB(self) -> Tensor:
        return torch.eye(self.num_blocks, dtype=torch.float64)

    def velocity(self, x_NBD: Tensor, tau_B: Tensor, reads_BB: Tensor) -> Tensor:
        """One pass: E[eps_b - x0_b | x_j for every j with reads[b, j]] of all blocks, (N, B, D).

        Args:
            x_NBD: the blocks as they are read.
            tau_B: their times in [0, 1].
            reads_BB: bool; row b: the blocks that block b reads, itself included.

        Raises ValueError for other shapes, and for a block that does not read itself.
        """
        self._check(x_NBD, tau_B, reads_BB)
        return apply(self.velocity_weights(tau_B, reads_BB), x_NBD)

    def velocity_weights(self, tau_B: Tensor, reads_BB: Tensor) -> Tensor:
        """(..., B, B): row b holds the coefficients of block b's velocity, 0 where it does not read.

        tau (..., B) and reads (..., B, B) may have leading dimensions.
        """
        cross_BB = tau_B.diag_embed() - self.covariance * (1 - tau_B)[..., None, :]  # Cov(eps_b - x0_b, x_j)
        return self._regression(cross_BB, tau_B, reads_BB)

    def data_given_others(self, tau_B: Tensor, reads_BB: Tensor) -> tuple[Tensor, Tensor]:
        """x0_b given what block b reads without itself: coefficients (B, B) of the mean, and the variance (B,)."""
        others_BB = reads_BB & (self._identity_BB == 0)
        cross_BB = self.covariance * (1 - tau_B)
        weights_BB = self._regression(cross_BB, tau_B, others_BB)
        return weights_BB, 1 - (weights_BB * cross_BB).sum(1)

    def cleaner(self, tau_B: Tensor, to_B: Tensor, reads_BB: Tensor) -> tuple[Tensor, Tensor]:
        """x_b at its lower time to_b, given what block b reads at tau: coefficients (B, B), and the variance (B,).

        The coupling of two levels is the Markov chain that adds noise, x(t) = a x(s) + sqrt(t^2 - a^2 s^2) z with
        a = (1 - t) / (1 - s), as in ancestral sampling (arXiv 2006.11239, 2107.00630). Given x_j(s), x_j(t) tells
        nothing more about any other block. Where to_b = tau_b the conditional is the block itself.
        """
        stay_B = to_B == tau_B
        scale_B = torch.where(stay_B, 1.0, (1 - tau_B) / (1 - to_B).clamp_min(1e-300))
        cross_BB = (1 - to_B)[:, None] * self.covariance * (1 - tau_B) + (scale_B * to_B**2).diag()
        weights_BB = self._regression(cross_BB, tau_B, reads_BB)
        return weights_BB, (1 - to_B) ** 2 + to_B**2 - (weights_BB * cross_BB).sum(1)

    def _regression(self, cross_BB: Tensor, tau_B: Tensor, reads_BB: Tensor) -> Tensor:
        """Coefficients of E[y_b | x_j, j in reads[b]] from Cov(y_b, x_j): B masked systems, solved together."""
        keep_B = 1 - tau_B
        noisy_BB = keep_B[..., :, None] * self.covariance * keep_B[..., None, :] + tau_B.square().diag_embed()
        inside_BBB = reads_BB[..., :, :, None] & reads_BB[..., :, None, :]
        systems_BBB = torch.where(inside_BBB, noisy_BB[..., None, :, :], self._identity_BB)
        return torch.linalg.solve(systems_BBB, torch.where(reads_BB, cross_BB, 0.0))

    def _check(self, x_NBD: Tensor, tau_B: Tensor, reads_BB: Tensor) -> None:
        """ValueError for arguments of `velocity` that do not fit together."""
        B = self.num_blocks
        if x_NBD.ndim != 3 or x_NBD.shape[1] != B:
            raise ValueError(f"x has the shape {tuple(x_NBD.shape)}, not (N, {B}, D); give all {B} blocks")
        if tau_B.shape != (B,) or reads_BB.shape != (B, B) or reads_BB.dtype != torch.bool:
            found = f"tau {tuple(tau_B.shape)}, reads {tuple(reads_BB.shape)} {reads_BB.dtype}"
            raise ValueError(f"{found}: give one time per block, ({B},), and a bool matrix ({B}, {B})")
        if not reads_BB.diagonal().all():
            raise ValueError(f"block {int((~reads_BB.diagonal()).nonzero()[0])} does not read itself; set its diagonal")


def apply(weights_BB: Tensor, x_NBD: Tensor) -> Tensor:
    """Row b of the result is the sum over j of weights[b, j] x_j: (N, B, D)."""
    return weights_BB @ x_NBD
