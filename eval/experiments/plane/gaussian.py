"""Gaussian data with its closed-form flow map, as the callable of objectives and samplers.

Data N(mean, U diag(variance) U^T) in C channels, one latent per position. Along the eigenvectors the map preserves
quantiles: deviation(t)^2 = (1 - t)^2 variance + t^2.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omni.objectives.base import Items
from omni.rng import Key


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance). basis, variance: eigenvectors and eigenvalues of the covariance."""

    mean: Tensor  # (C,) float64
    covariance: Tensor  # (C, C)
    basis: Tensor = field(init=False)
    variance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        variance, basis = torch.linalg.eigh(self.covariance)
        object.__setattr__(self, "variance", variance)
        object.__setattr__(self, "basis", basis)

    @property
    def channels(self) -> int:
        """C."""
        return self.mean.numel()

    def sample(self, key: Key, *shape: int) -> Tensor:
        """(*shape, C) float64."""
        z = key.normal((*shape, self.channels), torch.float64)
        return self.mean + (z * self.variance.sqrt()) @ self.basis.mT

    def deviation(self, t: Tensor) -> Tensor:
        """t (..., 1) -> (..., C), along the eigenvectors."""
        return ((1 - t) ** 2 * self.variance + t**2).sqrt()

    def map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact flow map X(x, t, s): x (..., C); t, s (..., 1)."""
        z = (x - (1 - t) * self.mean) @ self.basis
        return (1 - s) * self.mean + (z * self.deviation(s) / self.deviation(t)) @ self.basis.mT

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The exact marginal velocity E[eps - x0 | x_t = x]."""
        z = (x - (1 - t) * self.mean) @ self.basis
        rate = (t - (1 - t) * self.variance) / self.deviation(t) ** 2
        return -self.mean + (z * rate) @ self.basis.mT

    def average(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact average velocity F: the map is x + (s - t) F."""
        gap = s - t
        safe = torch.where(gap == 0, torch.ones_like(gap), gap)
        return torch.where(gap == 0, self.velocity(x, t), (self.map(x, t, s) - x) / safe)


LINE = Gaussian(torch.tensor([0.7]).double(), torch.tensor([[0.36]]).double())
PLANE = Gaussian(torch.tensor([0.7, -0.4]).double(), torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double())


@dataclass(frozen=True)
class GaussianCall:
    """The exact F of a Gaussian, plus `error * x` (times t, so that it is wrong in t and s too).

    `weight` (I,), set by `guided`, is stored and changes nothing: a Gaussian has no condition.
    """

    items: Items
    gaussian: Gaussian
    error: float | Tensor = 0.0
    beta: Tensor | None = None
    frozen: bool = False

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        start, end = self.items.expand(t), self.items.expand(s)
        found = self.gaussian.average(x, start, end) + self.error * x * (start + 0.5 * end)
        return found.detach() if self.frozen else found

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        return self.with_derivative(x, t, s, dx, dt, ds)[1].detach()

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        flow, rate, *_ = torch.func.jvp(self.__call__, (x, t, s), (dx, dt, ds))
        return flow, rate

    def target(self, graph: bool = False) -> GaussianCall:
        return replace(self, frozen=not graph)

    def null(self) -> GaussianCall:
        return self

    def guided(self, beta: Tensor) -> GaussianCall:
        return replace(self, beta=beta)


def gaussian_items(gaussian: Gaussian, num: int = 64, size: int = 4, copies: int = 1, key: Key | None = None) -> Items:
    """`num` blocks of `size` latents each, with `copies` copies of every block, in one row; float64."""
    latents = (
        gaussian.sample(key or Key(3), num, 1, size)
        .expand(num, copies, size, gaussian.channels)
        .reshape(1, -1, gaussian.channels)
    )
    item = torch.arange(num * copies).repeat_interleave(size)[None]
    return Items(latents, item, [(n, 0, c) for n in range(num) for c in range(copies)])
