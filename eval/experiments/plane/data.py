"""2-D data sets, batches of them as items, and the sliced Wasserstein distance between two clouds of points.

Every data set has mean 0 and about unit variance per coordinate, as the path x_t = (1 - t) x0 + t eps assumes. A point
is an item of one latent with two channels.

Legend: N points, P projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.objectives.base import Items
from omni.objectives.pairing import Pairing
from omni.objectives.times import BatchNames
from omni.registry import Registry
from omni.rng import Key

DATA_SETS: Registry[Callable[[Key, int], Tensor]] = Registry("data set")


@DATA_SETS.register("mixture")
def mixture(key: Key, num: int) -> Tensor:
    """(N, 2) float32: eight Gaussians of deviation 0.12 on a circle, equally likely."""
    deviation = 0.12
    angle = (key.fold("mode").uniform((num,)) * 8).floor() * (math.pi / 4)
    centre = math.sqrt(2 * (1 - deviation**2)) * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + deviation * key.fold("within").normal((num, 2))


@DATA_SETS.register("checkerboard")
def checkerboard(key: Key, num: int) -> Tensor:
    """(N, 2) float32: uniform on the eight black squares of a 4 x 4 board of side 2 sqrt(3)."""
    column = (key.fold("column").uniform((num,)) * 4).floor()
    row = 2 * (key.fold("row").uniform((num,)) * 2).floor() + column % 2
    inside = key.fold("within").uniform((num, 2))
    return (torch.stack([column, row], -1) + inside - 2) * (math.sqrt(3) / 2)


@DATA_SETS.register("moons")
def moons(key: Key, num: int) -> Tensor:
    """(N, 2) float32: two interleaved half circles with noise of deviation 0.08."""
    upper = key.fold("moon").uniform((num,)) < 0.5
    angle = math.pi * key.fold("angle").uniform((num,))
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x / 0.866, y / 0.495], -1) + 0.08 * key.fold("noise").normal((num, 2))


@dataclass(frozen=True)
class PlaneItems(Items):
    """A batch of points that share a generator: all noise of a purpose comes from one (see BatchNames)."""

    def noise(self, key: Key, purpose: str = "noise") -> Tensor:
        """(1, N, 2) standard normal, in the latents' dtype."""
        drawn = key.fold(purpose).normal(tuple(self.latents.shape)).to(self.latents.dtype)
        return self.paired(drawn, purpose)


def plane_items(points_N2: Tensor, progress: float = 1.0, pairing: Pairing = "independent") -> PlaneItems:
    """N points -> N items of one latent each, in one row. progress: the share of training that is done."""
    num = len(points_N2)
    return PlaneItems(points_N2[None], torch.arange(num)[None], BatchNames(num), progress=progress, pairing=pairing)


def sliced_wasserstein(a_N2: Tensor, b_N2: Tensor, key: Key, num_projections: int = 32) -> float:
    """sqrt(E over directions of W2^2 of the projected points) (arXiv 1506.06041), both clouds of one size.

    The directions are even over the half circle from a keyed offset, which has far less variance than independent ones.
    In one dimension W2^2 is the mean squared difference of the sorted points.
    """
    if a_N2.shape != b_N2.shape:
        raise ValueError(f"clouds of {len(a_N2)} and {len(b_N2)} points; give two of one size")
    turn = (torch.arange(num_projections) + key.fold("directions").uniform(())) * (math.pi / num_projections)
    directions_P2 = torch.stack([turn.cos(), turn.sin()], -1)
    sorted_a, sorted_b = ((directions_P2 @ c.float().T).sort(-1).values for c in (a_N2, b_N2))
    return float((sorted_a - sorted_b).double().pow(2).mean().sqrt())
