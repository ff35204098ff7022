"""Kernels between particles, and the squared maximum mean discrepancy (MMD, arXiv 0805.2368) of two groups.

With d = |a - b|_2, e = d^2 / D and a scale w of each group; the first two kernels are averaged over `bandwidths` h:

    laplace        exp(-(w / h) max(d, min_distance) / D)   (arXiv 2503.07565, section 4: 1e-8)
    rbf            exp(-(w / h)^2 d^2 / (2 D))
    energy         -sqrt(e)                                 these three do not use w; they are conditionally positive
    squared        -e                                       definite; with one particle: consistency training
    pseudo_huber   huber_c - sqrt(e + huber_c^2)

A constant added to a kernel cancels in the discrepancy. So the first two are returned minus 1, which keeps precision
where D is large and every kernel value is close to 1. Gradients at distance 0 are 0.

Legend: G groups, M and K particles, D numbers in each.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omni.config import Frozen
from omni.objectives.weighting import distance


class Kernel(Frozen):
    """See the module docstring. Bandwidths multiply the length scale 1 / w: larger is wider."""

    kind: Literal["laplace", "rbf", "energy", "squared", "pseudo_huber"] = "laplace"
    bandwidths: tuple[float, ...] = (1.0,)
    min_distance: float = Field(default=1e-8, gt=0)
    huber_c: float = Field(default=0.00054, gt=0)

    @field_validator("bandwidths")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0:
            raise ValueError(f"bandwidths must be one or more positive numbers, got {list(value)}")
        return value

    def __call__(self, a_GMD: Tensor, b_GKD: Tensor, scale_G: Tensor) -> Tensor:
        """(G, M, K), up to a constant."""
        d, dim, w = pairwise_distance(a_GMD, b_GKD), a_GMD.shape[-1], scale_G[:, None, None]
        if self.kind == "laplace":
            d = d.clamp(min=self.min_distance) / dim
            return torch.stack([torch.expm1(-w / h * d) for h in self.bandwidths]).mean(0)
        if self.kind == "rbf":
            e = d.pow(2) / dim
            return torch.stack([torch.expm1(-0.5 * (w / h) ** 2 * e) for h in self.bandwidths]).mean(0)
        kinds = {"energy": "norm", "squared": "l2", "pseudo_huber": "pseudo_huber"}
        return -distance(d.pow(2) / dim, kinds[self.kind], self.huber_c)  # type: ignore[arg-type]


def pairwise_distance(a_GMD: Tensor, b_GKD: Tensor) -> Tensor:
    """(G, M, K) Euclidean, from differences: |a|^2 + |b|^2 - 2ab has no precision for near particles."""
    return torch.cdist(a_GMD, b_GKD, compute_mode="donot_use_mm_for_euclid_dist")


def squared_discrepancy(y_GMD: Tensor, z_GMD: Tensor, kernel: Kernel, scale_G: Tensor, *, diagonals: bool) -> Tensor:
    """(G,): mean over pairs of k(y, y') + k(z, z') - 2 k(y, z').

    With the diagonals j = k it is the V-statistic, never negative for a positive definite kernel. Without them,
    particles of different index being independent, it is unbiased: 0 in expectation if y and z have one
    distribution.
    """
    total = kernel(y_GMD, y_GMD, scale_G) + kernel(z_GMD, z_GMD, scale_G) - 2 * kernel(y_GMD, z_GMD, scale_G)
    if diagonals:
        return total.mean((1, 2))
    num = y_GMD.shape[1]
    if num < 2:
        raise ValueError("the unbiased discrepancy needs at least 2 particles in a group, got 1")
    return (total.sum((1, 2)) - total.diagonal(dim1=1, dim2=2).sum(-1)) / (num * (num - 1))
