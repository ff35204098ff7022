"""Samples of a Gaussian distribution as items of one latent each; 100,000 are sampled in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gaussian import Gaussian
from torch import Tensor

from omni.objectives.base import Items
from omni.objectives.times import BatchNames
from omni.rng import Key


@dataclass(frozen=True)
class Cloud(Items):
    def noise(self, key: Key, purpose: str = "noise") -> Tensor:
        return key.fold(purpose).normal(tuple(self.latents.shape), self.latents.dtype)


def cloud(distribution: Gaussian, num: int, copies: int = 1, key: Key | None = None) -> Cloud:
    """`num` points, each repeated `copies` times; float64."""
    points = (
        distribution.sample(key or Key(3), num, 1)
        .expand(num, copies, distribution.channels)
        .reshape(1, -1, distribution.channels)
    )
    return Cloud(points, torch.arange(num * copies)[None], BatchNames(num * copies, copies))


def standard_errors(value: Tensor) -> float:
    """The mean of independent values divided by its standard error."""
    return float(value.mean() / value.std() * len(value) ** 0.5)
