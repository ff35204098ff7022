"""Semidiscrete coupling of the plane's noise with a set of points (arXiv 2509.25519): the cells of optimal transport.

    cell_i = {x : i = argmax_j  c . p_j + g_j}

c: the noise along the principal directions of the points; p_j: the points along them, in units of their spread; g: the
dual potential, which makes the cells equally heavy. Together they are the standard normal noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni.rng import Key

SAMPLES = 1 << 14  # of the noise, at least, which the masses of cells are measured with
STEPS = 200
AT_ONCE = 1 << 20  # scores that a step of the ascent looks at


class Semidiscrete:
    """points (n, 2), n >= 2: `chosen` says whose cell noise (num, 2) is in, int64 (num,)."""

    def __init__(self, points: Tensor, key: Key) -> None:
        values = points - points.mean(0)
        strength, vectors = torch.linalg.eigh((values.T @ values).double() / len(values))
        spread = strength.flip(0).sqrt().float()
        self.directions = vectors.flip(1).T.float().contiguous()
        self.points = values @ self.directions.T / spread.clamp(min=float(spread[0]) / 3)
        self.potentials = potentials(self.points, key)

    def chosen(self, noise: Tensor) -> Tensor:
        return (noise @ self.directions.T @ self.points.T + self.potentials).argmax(-1)


def potentials(points: Tensor, key: Key) -> Tensor:
    """g (n,) with which each cell of `points` (n, d) has mass 1 / n: to a tenth of that for dozens of points, to a half
    for hundreds in few directions.

    Mirror ascent on the semidual of entropic transport (arXiv 2509.25519, section 3), on one sample of the noise, for
    many points in parts; the mean of its second half.
    """
    n, d = points.shape
    scores = key.normal((max(SAMPLES, 64 * n), d)) @ points.T
    spread, found, mean = float(scores.std().clamp(min=1e-6)), torch.zeros(n), torch.zeros(n)
    parts = scores.split(max(16, AT_ONCE // n))
    for step in range(STEPS):
        shares = torch.softmax((parts[step % len(parts)] + found) * (16 / spread), 1).mean(0)
        found = found - spread / (4 + step / 4) * (shares * n).clamp(min=1e-2).log()
        if 2 * step >= STEPS:
            mean += found / (STEPS - STEPS // 2)
    return mean - mean.mean()
